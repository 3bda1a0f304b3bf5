"""Small methods of training, one for each thing that an objective may ask of the trainer, and runs of them under a layout."""

import signal
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from bessemer.core.metrics import METRICS, read_metrics
from bessemer.distributed.layout import ParallelConfig
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.posttraining.data.packing import PairExample, pack_pair_examples
from bessemer.posttraining.preference.losses import SIGMOID, PairLossSettings
from bessemer.posttraining.preference.objective import KTOObjective, PreferenceObjective
from bessemer.posttraining.rewards.stage import RewardObjective
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.head import token_log_probs
from bessemer.training.loop import train
from bessemer.training.model_roles import POLICY, ModelRoles, OtherModel
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import Count, Metric, NextTokenObjective, Objective, Terms
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime

from .parity import SETTINGS, TWO_LAYERS, RandomBatches

MODEL = TWO_LAYERS


def log_probs_of(model, batch):
    """log p of each target, (B, T), with gradients."""
    hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, document_ids_BT=batch.document_ids_BT)
    targets_N = batch.targets_BT.flatten()
    log_probs_N, _ = token_log_probs(hidden_BTD.flatten(0, 1), model.head_weight, targets_N, temperature=1.3)
    return log_probs_N.view_as(batch.targets_BT)


class Pairs(Objective):
    """The first row of each pair is preferred (as in Rafailov et al. 2023, without a reference)."""

    def denominators(self, batch):
        return {"preference": Count(batch.tokens_BT.shape[0] // 2, "sequence")}

    def __call__(self, model, batch, context):
        assert batch.tokens_BT.shape[0] % 2 == 0
        sums_B1 = context.sum_over_context(batch.sequence_sums(log_probs_of(model, batch)))
        chosen_P, rejected_P = sums_B1.view(-1, 2).unbind(1)
        losses_P = -logsigmoid(0.1 * (chosen_P - rejected_P))
        margins_P = (chosen_P - rejected_P).detach()
        metrics = {"margin": Metric(margins_P.sum(), len(margins_P), margins_P.max())}
        return Terms({"preference": context.once(losses_P.sum())}, metrics)


class PackedTerms(Objective):
    """Packed sequences: a term over tokens, weighted by their sequence's advantage, one over sequences, which is not linear in
    their tokens, and one over a constant."""

    def denominators(self, batch):
        sequences = int((batch.per_sequence["length"] > 0).sum())
        return {"policy": Count(batch.targets), "fit": Count(sequences, "sequence"), "size": Count(50.0, "constant")}

    def annotate(self, models, batch):
        length_BS = batch.sequence_sums((batch.targets_BT != IGNORE_INDEX).double())
        return batch.with_values(per_sequence={"length": length_BS})

    def __call__(self, model, batch, context):
        log_probs_BT = log_probs_of(model, batch)
        policy = -(batch.of_tokens(batch.per_sequence["advantage"]) * batch.per_token["weight"] * log_probs_BT).sum()
        length_BS = batch.per_sequence["length"]
        mean_BS = context.sum_over_context(batch.sequence_sums(log_probs_BT)) / length_BS.clamp(min=1)
        fit = context.once(mean_BS.square().sum())
        return Terms({"policy": policy, "fit": fit, "size": log_probs_BT.square().sum()})


class Teacher(Objective):
    """Log-probabilities like those of a frozen teacher."""

    def denominators(self, batch):
        return {"distance": Count(batch.targets)}

    def annotate(self, models, batch):
        return batch.with_values(per_token={"teacher": models.log_probs(batch, "teacher", temperature=1.3)})

    def __call__(self, model, batch, context):
        return Terms({"distance": (log_probs_of(model, batch) - batch.per_token["teacher"]).square().sum()})


class ActorAndCritic(Objective):
    """A policy gradient with values of a critic that is trained beside it."""

    def denominators(self, batch):
        return {"policy": Count(batch.targets), "value": Count(batch.targets)}

    def annotate(self, models, batch):
        values_BT = models.per_token("critic", batch, self._values)
        returns_BT = (batch.tokens_BT % 3).float().flip(1).cumsum(1).flip(1) / 16
        return batch.with_values(per_token={"advantage": returns_BT - values_BT, "return": returns_BT})

    def __call__(self, model, batch, context):
        has_target_BT = batch.targets_BT != IGNORE_INDEX
        if context.role == POLICY:
            return Terms({"policy": -(batch.per_token["advantage"] * log_probs_of(model, batch)).sum()})
        errors_BT = (self._values(model, batch) - batch.per_token["return"]).square() * has_target_BT
        return Terms({"value": errors_BT.sum()}, {"value_error": Metric(errors_BT.detach().sum(), has_target_BT.sum())})

    @staticmethod
    def _values(model, batch):
        hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, document_ids_BT=batch.document_ids_BT)
        return hidden_BTD[..., 0] + hidden_BTD[..., 1:].square().mean(-1)


class PairBatches(RandomBatches):
    """Rows of one sequence each, two by two."""

    def batch(self, step, rows=slice(None), mesh=ALONE):
        return replace(super().batch(step, rows), together=2)


class PackedBatches(RandomBatches):
    """Rows of several sequences with advantages; the last tokens of a row are padding."""

    def batch(self, step, rows=slice(None), mesh=ALONE):
        packed = super().batch(step)
        documents_BT = packed.document_ids_BT + 1
        documents_BT[:, -2:] = 0
        targets_BT = packed.targets_BT.masked_fill(documents_BT == 0, IGNORE_INDEX)
        whole = replace(packed, document_ids_BT=documents_BT, targets_BT=targets_BT, sequences=6)
        generator = torch.Generator().manual_seed(step)
        advantage_BS = torch.randn(documents_BT.shape[0], 6, generator=generator)
        weight_BT = torch.rand(documents_BT.shape, generator=generator)
        return whole.with_values(per_sequence={"advantage": advantage_BS}, per_token={"weight": weight_BT}).rows(rows)


class SelfMadeBatches(RandomBatches):
    """Targets are what the policy finds likeliest: of half of them now, of the others a step ago, which are held until then."""

    lookahead = 0

    def bind(self, models):
        self._models, self._held_BT = models, None

    def batch(self, step, rows=slice(None), mesh=ALONE):
        batch = super().batch(step, rows)
        before_BT = batch.targets_BT if self._held_BT is None else self._held_BT
        self._held_BT = self._models.per_token(POLICY, batch, self._likeliest).long()
        columns_T = torch.arange(batch.tokens_BT.shape[1])
        targets_BT = torch.where(columns_T % 2 == 0, self._held_BT, before_BT)
        return replace(batch, targets_BT=targets_BT.where(batch.targets_BT != IGNORE_INDEX, IGNORE_INDEX))

    def state_dict(self):
        return {"held": self._held_BT}

    def load_state_dict(self, state):
        self._held_BT = state["held"]

    @staticmethod
    def _likeliest(model, batch):
        """The token, of the first 96, whose own channel pattern fits the hidden state best, whatever shards the vocabulary."""
        hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, document_ids_BT=batch.document_ids_BT)
        patterns_VD = torch.randn(96, hidden_BTD.shape[-1], dtype=hidden_BTD.dtype, generator=torch.Generator().manual_seed(7))
        return (hidden_BTD @ patterns_VD.T).argmax(-1)


class RewardPairs(RandomBatches):
    """Packed pairs of answers, each with one target, its end; the last tokens of a row are padding."""

    def batch(self, step, rows=slice(None), mesh=ALONE):
        packed = super().batch(step)
        columns_T = torch.arange(packed.tokens_BT.shape[1])
        lengths_B1 = 2 + torch.arange(packed.tokens_BT.shape[0])[:, None] % 3
        documents_BT = columns_T // lengths_B1 + 1
        documents_BT = documents_BT.masked_fill(documents_BT > 4, 0)
        is_end_BT = (columns_T % lengths_B1 == lengths_B1 - 1) & (documents_BT > 0)
        targets_BT = torch.where(is_end_BT, packed.tokens_BT, IGNORE_INDEX)
        whole = Batch(packed.tokens_BT, targets_BT, columns_T % lengths_B1, documents_BT, sequences=4)
        weight_BS, margin_BS = torch.ones(len(targets_BT), 4), torch.arange(4.0).expand(len(targets_BT), 4) / 8
        weight_BS[1, 2:] = 0
        return whole.with_values(per_sequence={"pair_weight": weight_BS, "margin": margin_BS}).rows(rows)


class JudgedAnswers(PackedBatches):
    """Packed answers that are good or bad, with their mismatched twins beside them."""

    def batch(self, step, rows=slice(None), mesh=ALONE):
        own, twins = (super(JudgedAnswers, self).batch(number) for number in (step, step + 100))
        values = {
            f"mismatched_{name}": getattr(twins, name)
            for name in ("tokens_BT", "targets_BT", "positions_BT", "document_ids_BT")
        }
        is_answer_BS = torch.zeros(own.tokens_BT.shape[0], 6)
        for row, documents_T in enumerate(own.document_ids_BT):
            is_answer_BS[row, : int(documents_T.max())] = 1
        is_desirable_BS = is_answer_BS * (torch.arange(6) % 2)
        return replace(own, per_token=values, per_sequence={"is_answer": is_answer_BS, "is_desirable": is_desirable_BS}).rows(
            rows
        )


class SharedPrompts(RandomBatches):
    """Packed pairs of answers, whose prompt is in a row once; the last row is empty."""

    def batch(self, step, rows=slice(None), mesh=ALONE):
        numbers = np.random.default_rng(step)
        length = self._shape[1]
        pairs = []
        for _ in range(self.batch_size - 1):
            prompt = numbers.integers(0, self._vocab_size, length // 2 - 3)
            sides = []
            for answer in (2, 4):
                tokens = np.concatenate([prompt, numbers.integers(0, self._vocab_size, answer)])
                targets = np.where(np.arange(len(tokens)) < len(prompt) - 1, IGNORE_INDEX, np.roll(tokens, -1))
                sides.append((tokens, targets))
            pairs.append(PairExample(*sides))
        whole = pack_pair_examples(pairs, length, 0, lambda _: self.batch_size, shares_prompts=True)
        assert whole.visible_to_BT is not None
        return whole.rows(rows)


#: By name: the objective, the batches, and the roles of the models beside the policy that are trained, and frozen.
METHODS = {
    "pairs": (Pairs, PairBatches, (), ()),
    "packed": (PackedTerms, PackedBatches, (), ()),
    "teacher": (Teacher, RandomBatches, (), ("teacher",)),
    "critic": (ActorAndCritic, RandomBatches, ("critic",), ()),
    "self-made": (None, SelfMadeBatches, (), ()),
}
#: Of post-training, as it is.
PREFERENCES = {
    "reward": (partial(RewardObjective, centering=0.1), RewardPairs, (), ()),
    "dpo": (partial(PreferenceObjective, SIGMOID, PairLossSettings(), 0.1), SharedPrompts, (), ("reference",)),
    "kto": (partial(KTOObjective, undesirable_weight=0.5), JudgedAnswers, (), ("reference",)),
}


class StoppedError(Exception):
    pass


def gathered(parallel):
    """Whether the whole weights of a model under a layout are those that it was made with."""
    config = PretrainConfig(**(SETTINGS | {"parallel": parallel}))
    mesh, runtime = Mesh.here(ParallelConfig(**parallel), "cpu"), Runtime.of(config, torch.device("cpu"))
    made = dict(initial_decoder(ModelConfig(**MODEL), seed=3).named_parameters())
    prepared = prepare_model(initial_decoder(ModelConfig(**MODEL), seed=3), config, runtime, mesh)
    found = ModelRoles({POLICY: prepared}, runtime, mesh=mesh).full_weights()
    return found.keys() == made.keys() and all(torch.equal(found[name], weight) for name, weight in made.items())


def run(out, method, parallel=None, stop_after=None, layers=2, **changes):
    """Train in a folder by a method, in float64; gives the losses, norms and figures that were logged, by step."""
    settings = {"micro_batch_size": 2, "checkpoint_minutes": 1e9, "diagnostics_every": 0}
    config = PretrainConfig(**(SETTINGS | settings | changes | {"parallel": parallel or {}}))
    mesh = ALONE if parallel is None else Mesh.here(ParallelConfig(**parallel), "cpu")
    objective, source, beside, frozen = (METHODS | PREFERENCES)[method]
    seeds = {POLICY: 3, "critic": 4, "teacher": 5, "reference": 6}
    shape = MODEL | {"num_hidden_layers": layers, "num_scores": 1 if method == "reward" else 0}
    decoders = {role: initial_decoder(ModelConfig(**shape), seed=seed).double() for role, seed in seeds.items()}
    batches = source(
        config.batch_size, config.context_length, MODEL["vocab_size"], packed=issubclass(source, (PackedBatches, RewardPairs))
    )

    def stop(number, frame):
        raise StoppedError

    def stopping(finished, trainer):
        if finished == stop_after and mesh.leads:
            signal.raise_signal(signal.SIGTERM)
        return {}

    before = signal.signal(signal.SIGTERM, stop)
    try:
        train(
            decoders[POLICY],
            batches,
            config,
            out,
            runtime=Runtime.of(config, torch.device("cpu")),
            seed=1,
            objective=NextTokenObjective(decoders[POLICY].config) if objective is None else objective(),
            others=[OtherModel(role, decoders[role], trained=role in beside) for role in (*beside, *frozen)],
            on_step_end=stopping,
            mesh=mesh,
        )
    except StoppedError:
        return "stopped"
    finally:
        signal.signal(signal.SIGTERM, before)
    timed = {"seconds", "tokens_per_second", "gflops", "data_wait", "mfu"}
    return [{name: value for name, value in record.items() if name not in timed} for record in read_metrics(out / METRICS)]
