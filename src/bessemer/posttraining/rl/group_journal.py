"""Judged groups on disk, from the moment they are complete until no checkpoint needs them: a run that is killed finds them.

One line of JSON for each group, under its number, which counts the prompts that were asked from 0. A file holds the groups of
about one rollout, so that used ones are removed whole.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bessemer.posttraining.rewards.rule_based import FAILURE, TOTAL
from bessemer.posttraining.rl.policy_sampler import JudgedGroup
from bessemer.posttraining.rl.rollouts import Judged
from bessemer.posttraining.sampling.samples import Prompt, Sample

#: Folder of the journal, beside the run's checkpoints.
JOURNAL = "rollouts"
#: Columns of an episode's prompt that the episode has added.
_ADDED = (TOTAL, FAILURE)


class GroupJournal:
    """The groups of one run. Any number of threads add to it."""

    def __init__(self, folder: Path, fingerprint: str, groups_in_file: int) -> None:
        """fingerprint: of the settings and prompts that the groups are of; what the folder holds of others is removed."""
        self._folder = folder
        self._size = groups_in_file
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        #: Smallest number that the newest checkpoint needs, and that the one before it needed.
        self._needed = (0, 0)

    def read(self, first: int) -> dict[int, dict[str, Any]]:
        """Entries of all groups from `first` on, by number; a line that was not written to its end is left out.

        Removes what is older, and what belongs to other settings.
        """
        entries: dict[int, dict[str, Any]] = {}
        for path in sorted(self._folder.glob("groups-*.jsonl")):
            own = self._entries(path)
            kept = {number: entry for number, entry in own.items() if number >= first}
            if not kept:
                path.unlink()
            entries |= kept
        return entries

    def add(self, number: int, entry: Mapping[str, Any]) -> None:
        """Write a group. It survives the end of this process."""
        line = json.dumps({"fingerprint": self._fingerprint, "group": number, **entry})
        with self._lock:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path(number).open("a", encoding="utf-8") as file:
                # behind a line that a killed process did not finish
                file.write(f"\n{line}\n")

    def checkpoint(self, first: int) -> None:
        """Note the first group that a checkpoint needs, and remove those that this and the one before it do not: a checkpoint
        may still fail to be written."""
        with self._lock:
            self._needed = (first, self._needed[0])
            oldest = min(self._needed)
            for path in self._folder.glob("groups-*.jsonl"):
                if (int(path.stem.rpartition("-")[2]) + 1) * self._size <= oldest:
                    path.unlink()

    def remove(self) -> None:
        """Remove everything: the run is over."""
        for path in self._folder.glob("groups-*.jsonl"):
            path.unlink()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _path(self, number: int) -> Path:
        return self._folder / f"groups-{number // self._size:06d}.jsonl"

    def _entries(self, path: Path) -> dict[int, dict[str, Any]]:
        entries: dict[int, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["fingerprint"] == self._fingerprint:
                    entries[int(entry["group"])] = entry
            except (ValueError, LookupError, TypeError):
                continue
        return entries


def entry_of(judged: Judged) -> dict[str, Any]:
    """A judged group as plain values."""
    group = judged.group
    return {
        "samples": [
            {
                "ids": list(map(int, sample.ids)),
                "prompt_length": sample.prompt_length,
                "log_probs": list(sample.log_probs),
                "text": sample.text,
                "is_cut": sample.is_cut,
                "is_own": None if sample.is_own is None else [int(own) for own in sample.is_own],
                "versions": None if sample.versions is None else list(sample.versions),
                "added": {name: sample.prompt.columns[name] for name in _ADDED if name in sample.prompt.columns},
            }
            for sample in group.samples
        ],
        "rewards": group.rewards_GK.tolist(),
        "totals": group.totals_G.tolist(),
        "extra": list(map(dict, group.extra)),
        "failures": dict(judged.failures),
        "metrics": {name: list(values) for name, values in judged.metrics.items()},
    }


def judged_of(entry: Mapping[str, Any], prompt: Prompt) -> Judged:
    """The judged group of an entry. prompt: that its samples complete."""
    samples = []
    for one in entry["samples"]:
        added = one["added"]
        own = Prompt(prompt.turns, {**prompt.columns, **added}, prompt.stop, prompt.begin, prompt.tools) if added else prompt
        is_own = None if one["is_own"] is None else list(map(bool, one["is_own"]))
        samples.append(
            Sample(own, one["ids"], one["prompt_length"], one["log_probs"], one["text"], one["is_cut"], is_own, one["versions"])
        )
    rewards_GK = torch.tensor(entry["rewards"], dtype=torch.float64)
    totals_G = torch.tensor(entry["totals"], dtype=torch.float64)
    return Judged(JudgedGroup(samples, rewards_GK, totals_G, entry["extra"]), entry["failures"], entry["metrics"])
