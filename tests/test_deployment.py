"""The files of `deploy/`: what they say of the server is true of it, and the times in them fit each other."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from bessemer.cli.main import app
from bessemer.serving.config import ServingConfig

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture(scope="module")
def manifests():
    """The documents of the Kubernetes file by kind."""
    documents = YAML(typ="safe").load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def compose():
    return YAML(typ="safe").load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["bessemer"]


@pytest.fixture(scope="module")
def container(manifests):
    (only,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def options() -> set[str]:
    """The options of `bessemer serve`."""
    serve = get_command(app).commands["serve"]
    return {name for parameter in serve.params for name in parameter.opts}


def drain_seconds(words) -> float:
    given = next((word.partition("=")[2] for word in words if word.startswith("--drain-seconds=")), None)
    return ServingConfig().drain_seconds if given is None else float(given)


def test_every_option_is_one_of_the_command(compose, container):
    for words in (compose["command"], container["args"]):
        assert words[0] == "serve"
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options()
        # behind keys alone do other machines reach it
        assert "--host=0.0.0.0" in words and any(word.startswith("--keys=") for word in words)


def test_a_server_is_given_the_time_to_drain(manifests, compose, container):
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + drain_seconds(container["args"])
    assert int(compose["stop_grace_period"].removesuffix("s")) > drain_seconds(compose["command"])
    assert "STOPSIGNAL SIGTERM" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def test_probes_ask_what_they_are_for(container):
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health", "readiness": "/ready", "liveness": "/health"}
    assert container["readinessProbe"]["failureThreshold"] == 1


def test_a_service_leads_to_the_pods_and_its_name_is_let_in(manifests, container):
    service, deployment = manifests["Service"], manifests["Deployment"]
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert f"--allow-host={service['metadata']['name']}" in container["args"]


def test_nothing_runs_with_rights(manifests, compose, container):
    pod, text = manifests["Deployment"]["spec"]["template"]["spec"], (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    user = re.search(r"--uid (\d+)", text)[1]
    assert pod["securityContext"]["runAsNonRoot"] and str(pod["securityContext"]["runAsUser"]) == user
    assert text.index("\nUSER bessemer") < text.index("\nENTRYPOINT")
    assert container["securityContext"]["readOnlyRootFilesystem"] and compose["read_only"]


def test_where_kernels_are_kept_can_be_written(compose, container):
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    place = re.search(r"TORCH_EXTENSIONS_DIR=(\S+)", text)[1]
    assert any(mount["mountPath"] == place for mount in container["volumeMounts"])
    assert any(volume.endswith(f":{place}") for volume in compose["volumes"])
