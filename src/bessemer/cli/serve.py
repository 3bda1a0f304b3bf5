"""`bessemer serve`, and `bessemer keys` for the keys of its clients."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.options import ACTIVATION_BITS, ApproveTools, McpServersConfig, Model, Runs, ToolTokens, retired_option

if TYPE_CHECKING:
    from bessemer.assistant.hooks import Hook

keys = typer.Typer(
    no_args_is_help=True,
    help="Make, list and revoke the API keys of a server.",
    epilog="Example: bessemer keys add keys.jsonl anna\n\nbessemer serve smollm2 --keys keys.jsonl",
)

_File = Annotated[Path, typer.Argument(help="The file of keys that `bessemer serve --keys` reads.")]


@keys.command(epilog="Example: bessemer keys add keys.jsonl anna --requests-per-minute 60")
def add(
    context: typer.Context,
    file: _File,
    name: Annotated[str, typer.Argument(help="Name of the key in lists and logs.")],
    user: Annotated[
        str | None, typer.Option(help="User on whose behalf its requests are made (default: the key's name).")
    ] = None,
    group: Annotated[list[str] | None, typer.Option(help="A group that the user is in; may be repeated.")] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="The key may load and unload adapters, and see runs and their documents.")
    ] = False,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests in a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Most tokens of prompts and answers in a minute.")] = None,
) -> None:
    """Make a key, and print it: it is shown this once, and the file holds its hash."""
    from bessemer.cli.named import given_options, option_of
    from bessemer.core.errors import ConfigError
    from bessemer.serving.runtime.clients import KeyRecord, hash_key, new_key, read_keys, write_keys

    records = read_keys(file) if file.exists() else []
    if name in [record.name for record in records]:
        raise ConfigError(f"{file} has a key '{name}' already; revoke it first, or choose another name")
    key = new_key()
    given = given_options(context, "name", "user", "admin", "requests_per_minute", "tokens_per_minute")
    record = KeyRecord.parse(given | {"hash": hash_key(key), "groups": group or []}, option_of("keys add"))
    write_keys(file, [*records, record])
    print(key)


@keys.command("list", epilog="Example: bessemer keys list keys.jsonl")
def list_(file: _File) -> None:
    """The keys of a file, a line each."""
    from bessemer.serving.runtime.clients import read_keys

    for record in read_keys(file):
        limits = [f"{limit:,} {what} a minute" for limit, what in _limits(record.requests_per_minute, record.tokens_per_minute)]
        user = record.user or record.name
        print(" · ".join([record.name, f"user {user}", *(["admin"] if record.admin else []), *limits]))


@keys.command(epilog="Example: bessemer keys revoke keys.jsonl anna")
def revoke(file: _File, name: Annotated[str, typer.Argument(help="The key's name.")]) -> None:
    """Take a key out. A running server ends its streams within a second or two."""
    from bessemer.core.errors import ConfigError
    from bessemer.serving.runtime.clients import read_keys, write_keys

    records = read_keys(file)
    if name not in [record.name for record in records]:
        raise ConfigError(f"{file} has no key '{name}'")
    write_keys(file, [record for record in records if record.name != name])
    print(f"revoked {name}")


def _limits(requests: int | None, tokens: int | None) -> list[tuple[int, str]]:
    return [(limit, what) for limit, what in ((requests, "requests"), (tokens, "tokens")) if limit is not None]


#: Options by their panel in the help.
_access = partial(typer.Option, rich_help_panel="Who may use it")
_requests = partial(typer.Option, rich_help_panel="Requests")
_models = partial(typer.Option, rich_help_panel="Further models and adapters")
_memory = partial(typer.Option, rich_help_panel="Memory and batches")
_context = partial(typer.Option, rich_help_panel="Context and prefixes")
_speed = partial(typer.Option, rich_help_panel="How it is computed")
_devices = partial(typer.Option, rich_help_panel="Devices and processes")
_documents = partial(typer.Option, rich_help_panel="Documents")
_safety = partial(typer.Option, rich_help_panel="Safety")


def serve(
    context: typer.Context,
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name under which clients ask for the model.")] = None,
    api_key: Annotated[str | None, _access(help="Ask clients for this key.", envvar="BESSEMER_API_KEY")] = None,
    keys: Annotated[Path | None, _access(help="File of API keys, by `bessemer keys`; asks for one of them.")] = None,
    allow_host: Annotated[
        list[str] | None, _access(help="A name that clients may call the server by; * is any; may be repeated.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, _access(help="An origin, as https://example.org, whose pages may use the server; may be repeated.")
    ] = None,
    max_body: Annotated[float | None, _requests(help="MiB of a request above which it is refused; 8.")] = None,
    drain_seconds: Annotated[float | None, _requests(help="For running requests to finish after SIGTERM; 60.")] = None,
    request_log: Annotated[
        bool, _requests("--request-log", help="A line of JSON for every request, without what it says.")
    ] = False,
    feedback: Annotated[
        Path | None, _requests(help="Folder for thumbs and edits of the chat, as rows that post-training reads.")
    ] = None,
    index: Annotated[
        list[str] | None,
        _documents(
            help="Answer from this index of documents, as `bessemer index` makes it, where clients ask for it: FOLDER, or "
            "NAME=FOLDER; may be repeated."
        ),
    ] = None,
    rerank: Annotated[
        str | None,
        _documents(
            help="Order the passages that searches find by this model: a cross-encoder's folder, a language model (as MODEL), "
            "or URL#MODEL. Clients ask `/v1/rerank` for it by its name."
        ),
    ] = None,
    expand: Annotated[
        str | None,
        _documents(metavar="MODEL", help="Search also for headings that this language model writes in answer to a question."),
    ] = None,
    check: Annotated[
        Path | None,
        _documents(
            metavar="HEAD",
            help="Judge sentences of answers from documents by this entailment head, as `bessemer entailment` made it, and its "
            "model; else by words.",
        ),
    ] = None,
    uploads: Annotated[
        Path | None,
        _documents(help="Folder for clients' files and vector stores; without it they end with the server."),
    ] = None,
    also: Annotated[
        list[str] | None,
        _models(help="NAME=MODEL: another model, opened when clients ask for it by its name; may be repeated."),
    ] = None,
    alias: Annotated[list[str] | None, _models(help="Another name of the first model; may be repeated.")] = None,
    other_template: Annotated[
        bool,
        _models("--other-template", help="Serve with a chat template other than that of training; without it, it is refused."),
    ] = False,
    max_models: Annotated[int, _models(help="Models of --also that are open at once.", min=1)] = 2,
    models_memory: Annotated[
        float | None, _models(help="GiB that the files of the open models of --also may have together.", min=0.001)
    ] = None,
    keep_alive: Annotated[
        float | None, _models(help="Close a model of --also when nobody has asked for it for as many seconds.", min=0)
    ] = None,
    kv_memory: Annotated[float | None, _memory(help="GiB for the KV cache; a quarter of what is free.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, _memory(help="Share of a GPU's memory that weights, a step and the KV cache may take; 0.9.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, _memory(help="Most tokens of a step: longer prompts are read in chunks; 512, on a GPU 8,192.")
    ] = None,
    max_model_len: Annotated[
        int | None, _context(help="At most this many tokens of prompt and answer together; the model's context.")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, _memory(help="Type of the KV cache: auto, float32, bfloat16, float16, int8 or int4.")
    ] = None,
    context_overflow: Annotated[
        str | None,
        _context(
            help="A text longer than the context: refuse (default); shift, which leaves out its middle; summarise, by which "
            "the model's summaries stand for a chat's earlier turns and long texts; or retrieve, which keeps of a chat's "
            "longest texts the passages that fit the question."
        ),
    ] = None,
    context_keep: Annotated[int | None, _context(help="First tokens that a shift keeps (default 256).")] = None,
    max_num_seqs: Annotated[int | None, _memory(help="Sequences computed at once.")] = None,
    former_max_running: Annotated[int | None, retired_option("--max-running", "--max-num-seqs")] = None,
    max_waiting: Annotated[int | None, _requests(help="Completions that wait in the engine (default 32).")] = None,
    max_queued: Annotated[
        int | None, _requests(help="Requests in the queue for a place or a model; more are refused with 503 (default 256).")
    ] = None,
    queue_seconds: Annotated[
        float | None, _requests(help="Longest wait of a request in the queue, in seconds, before it gets 503 (default 120).")
    ] = None,
    dtype: Annotated[
        str | None, _speed(help="Type of weights and activations: auto (default), float32, bfloat16 or float16.")
    ] = None,
    paged_attention: Annotated[
        str | None, _speed(help="How KV blocks are read on a GPU: auto (default), flash, flashinfer, flex or gather.")
    ] = None,
    threads: Annotated[int | None, _speed(help="Threads of the compiled CPU kernels; measured.")] = None,
    activation_bits: Annotated[int | None, _speed(help=ACTIVATION_BITS)] = None,
    batch_invariant: Annotated[
        bool, _speed("--batch-invariant", help="A request never depends on what else is running, to the last bit.")
    ] = False,
    prefix_cache: Annotated[bool, _context(help="Reuse cached KV blocks for prompts that share a prefix.")] = True,
    prefix_store: Annotated[
        str | None, _context(help="Folder that keeps prefixes which several requests had in common over restarts.")
    ] = None,
    mmproj: Annotated[
        str | None, typer.Option(help="Of a GGUF: its encoder of pictures (llama.cpp's mmproj). Default: the one beside it.")
    ] = None,
    watermark: Annotated[
        Path | None, _requests(help="Key file of `bessemer watermark`: mark answers, so that the key finds them again.")
    ] = None,
    policy: Annotated[
        Path | None,
        _safety(
            help="YAML file of a policy: a guard checks what is asked, found, called and answered. `bessemer guard` tries it."
        ),
    ] = None,
    audit: Annotated[Path | None, _safety(help="File to which the guard adds each decision, without the texts.")] = None,
    audit_content: Annotated[
        bool, _safety("--audit-content", help="Keep the texts that were decided about, in the file and for the page Safety.")
    ] = False,
    guard_model: Annotated[
        str | None,
        _safety(help="FORM=URL: a guard model beside its rails: llama_guard_3, llama_guard_4, qwen3guard, gpt_oss_safeguard."),
    ] = None,
    adapter: Annotated[
        list[str] | None, _models(help="NAME=FOLDER: a low-rank adapter that clients ask for by its name; may be repeated.")
    ] = None,
    adapter_root: Annotated[
        Path | None, _models(help="Folder below which an admin key may load adapters while the server runs.")
    ] = None,
    accept_weights: Annotated[
        bool,
        _access(
            "--accept-weights", help="Let a trainer (`rl` with rollouts) replace the weights: an admin key, or this machine."
        ),
    ] = False,
    speculate: Annotated[str | None, _speed(help="Speculative decoding: ngram, mtp, or a draft model.")] = None,
    parallel: Annotated[
        list[str] | None, _devices(help="tensor=N or expert=N: share the model between processes; may be repeated.")
    ] = None,
    device: Annotated[str, _devices(help="auto, cpu, cuda or mps.")] = "auto",
    engine: Annotated[
        str, _devices(help="local, or ray: by --replicas of the model, on the cluster of RAY_ADDRESS or on this machine.")
    ] = "local",
    replicas: Annotated[int | None, _devices(help="How many; with --engine ray.", min=1)] = None,
    mcp_servers_config: McpServersConfig = None,
    tool_tokens: ToolTokens = 4000,
    approve_tools: ApproveTools = False,
    ask: Annotated[
        list[str] | None, typer.Option(help="Ask this through the API, print the answer, and stop; may be repeated.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Serve a model behind OpenAI's and Anthropic's APIs, with a web app to chat and to look inside."""
    from contextlib import ExitStack

    from bessemer.core.environment import without_collection
    from bessemer.core.errors import ConfigError

    loading = ExitStack()
    context.call_on_close(loading.close)
    loading.enter_context(without_collection())
    from bessemer.cli.guard import guard_config
    from bessemer.cli.named import (
        example_questions,
        find_entailment,
        find_expander,
        find_reranker,
        find_served,
        given_options,
        mcp_tools,
        named_folders,
        named_models,
        named_numbers,
        option_of,
        speculation,
    )
    from bessemer.cli.watermark import watermark_of
    from bessemer.core.policy import PolicyLines, read_policy
    from bessemer.core.store import read_json
    from bessemer.inference.engine import EngineConfig
    from bessemer.pipeline import run_names
    from bessemer.retrieval.index import INDEX
    from bessemer.serving.config import ServingConfig, is_loopback
    from bessemer.serving.retrieval.stores import index_folders
    from bessemer.serving.runtime.admission import QueueLimits
    from bessemer.serving.runtime.models import ModelSetup
    from bessemer.serving.server import serve as serve_engine
    from bessemer.webapp.app import WebSettings, public_paths, web_pages

    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine {engine}: local or ray")
    if replicas is not None and engine == "local":
        raise ConfigError("--replicas: of --engine ray; one engine shares a model between GPUs with --parallel")
    if accept_weights and engine == "ray":
        raise ConfigError("--accept-weights: of a server with one engine; name several such servers to the trainer instead")
    if engine == "ray" and policy is not None:
        raise ConfigError("--policy: of a server with one engine; replicas have no guard")
    if policy is None and (audit is not None or audit_content or guard_model is not None):
        raise ConfigError("--audit, --audit-content, --guard-model: of a server with --policy")
    if engine == "ray" and (index or uploads or rerank or expand or check):
        named = "--index, --uploads, --rerank, --expand, --check"
        raise ConfigError(f"{named}: of a server with one engine; replicas share no files")
    if engine == "ray" and mcp_servers_config is not None:
        raise ConfigError("--mcp-servers-config: of a server with one engine; replicas share no MCP servers")
    folder, name = find_served(model, runs), name or Path(model).name
    adapters = named_folders(adapter, taken=name)
    lengths = ("max_model_len", "context_overflow", "context_keep")
    memory = ("kv_memory", "gpu_memory_utilization", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens", *lengths)
    speed = ("dtype", "paged_attention", "threads", "activation_bits", "batch_invariant", "mmproj")
    given = given_options(context, *memory, "prefix_cache", "prefix_store", *speed)
    given |= speculation(speculate, runs) | named_numbers("parallel", parallel)
    if watermark is not None:
        given["watermark"] = watermark_of(watermark)
    if both := next((taken for taken in alias or [] if taken == name or taken in adapters), None):
        raise ConfigError(f"--alias {both}: the model or an adapter has that name already; choose another")
    additional = {
        its_name: find_served(its_model, runs)
        for its_name, its_model in named_models(also, [name, *adapters, *(alias or [])]).items()
    }
    settings = EngineConfig.parse(given, option_of("serve"))
    limits = ("max_waiting", "max_queued", "queue_seconds", "max_body", "drain_seconds", "request_log", "other_template")
    config = ServingConfig.parse(
        given_options(context, "host", "port", "api_key", "keys", "adapter_root", "accept_weights", "uploads", *limits)
        | {
            "hosts": [name.lower() for name in allow_host or ()],
            "origins": [origin.lower().rstrip("/") for origin in allow_origin or ()],
            "aliases": alias or [],
            "indexes": index_folders(index or []),
        },
        option_of("serve"),
    )
    if ask and (config.keys is not None or config.api_key is not None):
        raise ConfigError("--ask: of a server that asks for no key")
    # training data is shown to this machine, or to admin keys
    shown_runs = runs if config.keys is not None or is_loopback(host) else None
    run = model if shown_runs is not None and model in run_names(runs) else None
    # X-rays copy the model and take seconds of every core: they need a key, or a request from this machine
    makes_xrays = config.keys is not None or config.api_key is not None or is_loopback(host)
    lines = None if policy is None else PolicyLines.read(policy)
    redteams = None if shown_runs is None else Path("redteam")
    questions = example_questions(folder, runs / model)
    shown = WebSettings(folder, questions, feedback, shown_runs, run, makes_xrays, lines, redteams)
    setup = ModelSetup(
        folder,
        name,
        device=device,
        engine=settings,
        adapters={its_name: Path(its_folder) for its_name, its_folder in adapters.items()},
        additional=additional,
        max_models=max_models,
        models_memory=models_memory,
        keep_alive=keep_alive,
        other_template=other_template,
    )
    if engine == "ray":
        loading.close()
        try:
            from bessemer.serving.ray.application import serve_on_ray
        except ImportError:
            from bessemer.core.environment import install_extra

            raise ConfigError(f"--engine ray needs Ray: {install_extra('ray-serve')}") from None
        serve_on_ray(
            setup,
            config,
            replicas or 1,
            make_pages=partial(web_pages, shown),
            public=public_paths(),
            questions=ask or [],
        )
        return
    hooks: list[Hook] = []
    if policy is not None:
        from bessemer.safety.guard import Guard
        from bessemer.safety.hook import GuardHook

        guard = Guard(read_policy(policy), guard_config(guard_model, audit, audit_content))
        hooks = [GuardHook(guard)]
    server_tools = None
    if mcp_servers_config is not None:
        server_tools = context.with_resource(mcp_tools(mcp_servers_config, tool_tokens, approve=approve_tools))
    with loading, setup.open_engine() as opened:
        print(opened.describe())
        print(opened.arithmetic)
        if opened.kernels_origin is not None:
            print(opened.kernels_origin)
        if policy is not None:
            print(f"policy {guard.policy.name}, {guard.policy.hash[:8]}: {', '.join(name for name, _ in guard.rails)}")
        for its_name, place in config.indexes.items():
            about = read_json(place / INDEX, "index")
            print(f"documents {its_name}: {about['documents']:,}, in {about['passages']:,} passages")
        reranker = None if rerank is None else find_reranker(rerank, runs)
        expander = None if expand is None else find_expander(expand, runs)
        entails = None if check is None else find_entailment(check, runs).probabilities
        loading.close()
        pool = setup.model_pool(config.max_waiting, QueueLimits(config.max_queued, config.queue_seconds))
        serve_engine(
            opened,
            name,
            config,
            pages=web_pages(shown),
            pool=pool,
            questions=ask or [],
            hooks=hooks,
            server_tools=server_tools,
            reranker=reranker,
            expander=expander,
            entails=entails,
        )
