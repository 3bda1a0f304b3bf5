"""Settings of the stage `rl`: a method by name, and the parts that it is put together from (`methods.py`).

Imports no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.usercode import is_user_function
from bessemer.posttraining.data.made import ON_BAD_ROW, PLACES, OnBadRow
from bessemer.posttraining.preference.config import default_beta
from bessemer.posttraining.rewards.config import Rewards, named
from bessemer.posttraining.rl.methods import BUILT_IN_ADVANTAGES, PRESETS
from bessemer.posttraining.sampling.server_config import RolloutServers
from bessemer.training.adapter_config import TuningConfig


class CriticConfig(Config):
    """A model with a scalar head, which learns what reward a completion will still get (Schulman et al. 2017)."""

    start: Literal["policy", "reward_model"] = setting(
        "policy", "The weights it starts from: the policy's, with a new head, or those of the stage `reward` above."
    )
    learning_rate_factor: float = setting(
        10.0,
        "Factor of its learning rates over the policy's; if not given, 1 where the policy trains an adapter.",
        gt=0,
    )
    weight: float = setting(
        0.1, "Weight of its loss. Adam's update hardly depends on it; clipping of the critic's gradients does.", gt=0
    )
    clip: float | None = setting(0.2, "Most by which a value may move from that of the rollout; null: no limit.", gt=0)
    discount: float = setting(1.0, "γ: what a reward one token later is worth.", gt=0, le=1)
    decay: float = setting(
        0.95, "λ of generalised advantage estimation: 0 trusts the critic alone, 1 the rewards alone.", ge=0, le=1
    )


#: Raised when the same settings and inputs give other weights than before.
RL_VERSION = 7


class RLConfig(TuningConfig):
    """The stage `rl`: a policy samples completions of prompts and learns from their rewards."""

    # ten times that of full tuning, as in the other stages
    adapter_learning_rate: ClassVar[float] = 1e-5

    data: list[str] = setting(
        description="Prompts: " + PLACES + ", or tasks whose answers are generated, by name or YAML file, as in arithmetic; "
        "environment: the tasks that the environment has. Columns beside the prompt are passed to the rewards.",
        min_length=1,
    )
    prompt_column: str = setting("prompt", "Column of a file's prompts: messages, or a text.")
    chat: bool = setting(False, "Render texts and tasks by the model's chat template, as the user's message.")
    system: str | None = setting(None, "System message before prompts in messages that have none of their own.")
    tasks_folder: str | None = setting(None, "Folder of the tasks' data; absent: that of the task file.", affects_output=False)
    validation_share: float = setting(
        0.05, "Fraction of the prompts held out; prompts of the same words in any order are on the same side.", ge=0, lt=1
    )
    on_bad_row: OnBadRow = setting("skip", ON_BAD_ROW)
    validation_limit: int = setting(500, "Most held-out prompts that are answered at each validation.", unit="prompts", ge=1)
    rewards: Rewards = setting(
        description="What completions are worth: task, answer, program, regex, json_schema, format, length, overlong, "
        "repetition, judge, rubric, reward_model, environment, one that an installed package adds (entry points "
        "bessemer.rewards), or your own file.py:function with the signature of TRL's reward functions; each with its settings "
        "and a weight.",
        default_factory=lambda: named("task"),
    )
    environment: str | None = setting(
        None,
        "Your own file.py:function that makes an environment, or verifiers:NAME, openenv:URL: a sample is then an episode "
        "with several turns and tools in place of one completion, a row of the data is its task, and the reward `environment` "
        "is the one that it gives.",
        code=True,
    )
    environment_options: dict[str, Any] = setting(
        default_factory=dict, description="Settings of an environment of verifiers or OpenEnv, as that package has them."
    )
    max_turns: int = setting(1, "Most turns of an episode.", ge=1)
    environment_threads: int | None = setting(
        None,
        "Threads in which environments wait for a network or a program. 0: none, so that rollouts repeat to the last bit. "
        "absent: 32 for an environment whose attribute `waits` is true, else none.",
        affects_output=False,
        ge=0,
    )
    rollouts: RolloutServers | None = setting(
        None,
        "Servers that sample instead of this process, for example [http://127.0.0.1:8000]; `max_staleness` lets them sample "
        "ahead.",
    )
    reward_scale: Literal["sum", "decoupled"] = setting(
        "sum",
        "How several rewards become one advantage. sum: from their weighted sum. decoupled (GDPO): the weighted sum of each "
        "reward's z-score in its group, whitened; `advantage` is then not used.",
    )

    algorithm: str = setting("grpo", f"A method, which sets defaults for other settings: {', '.join(PRESETS)}.")
    advantage: str = setting(
        "grpo",
        "Advantage of a completion: grpo, group_mean, batch_deviation, centred_deviation, rloo, reinforce_pp, "
        "reinforce_pp_baseline.",
        plugins="bessemer.advantages",
    )
    critic: CriticConfig | None = setting(
        None,
        "A critic, trained beside the policy, from whose values the advantages of single tokens come (PPO); then `advantage` "
        "is not used. Absent: completions are compared with each other.",
    )
    pair_loss: str | None = setting(
        None,
        "A loss of pairs, as in `preference`, on the best and the worst completion of each prompt, in place of advantages and "
        "of losses of tokens (online DPO); `beta` is then its own.",
        plugins="bessemer.preference_losses",
    )
    discount: float = setting(
        1.0, "reinforce_pp and reinforce_pp_baseline: γ, what a reward one token later is worth.", gt=0, le=1
    )
    loss: str = setting(
        "clip", "Loss of a token: clip, gspo, cispo, sapo, importance, reinforce.", plugins="bessemer.policy_losses"
    )
    level: Literal["token", "sequence_sum", "sequence_mean"] | None = setting(
        None, "Level of the ratio of policies; absent: that of the loss."
    )
    aggregation: str = setting(
        "sequence_mean",
        "How tokens' losses become one: token_mean, sequence_mean, constant, prompt_mean.",
        plugins="bessemer.aggregations",
    )
    clip_low: float = setting(0.2, "The ratio of policies is clipped below 1 − clip_low.", ge=0)
    clip_high: float = setting(0.2, "The ratio of policies is clipped above 1 + clip_high.", ge=0)
    dual_clip: float | None = setting(None, "Largest factor of a negative advantage; absent: none (verl: 3).", gt=1)
    kl: Literal["loss", "reward"] = setting(
        "loss", "Whether the KL divergence from the initial model is part of the loss or of the reward, with beta above 0."
    )
    beta: float = setting(0.0, "Weight of the KL divergence; 0: none, and no reference is held in memory.", ge=0)
    divergence: str = setting(
        "k3",
        "Estimator of the divergence in the loss: k1, k2, k3, abs. In the reward it is k1.",
        plugins="bessemer.divergences",
    )
    weighted_divergence: bool = setting(
        False,
        "Multiply the divergence in the loss by the ratio of policies: with k3 its gradient is then that of the reverse KL "
        "divergence, and small where a token has become unlikely (DeepSeek-V3.2, arXiv 2512.02556; the default of TRL 1.16).",
    )
    entropy_weight: float = setting(0.0, "Weight of a bonus for the mean entropy of a token.", ge=0)
    correction: str = setting(
        "truncate",
        "Correction for tokens whose probabilities differ between sampler and trainer: none, truncate, mask_sequence, icepop, "
        "reject.",
        plugins="bessemer.corrections",
    )
    correction_low: float | None = setting(
        None,
        "Smallest importance weight that is kept; absent: 0.5 for icepop; 0.999 for reject, whose weight is a geometric mean.",
        gt=0,
    )
    correction_high: float | None = setting(
        None, "Largest importance weight; absent: 2 for truncate, 3 for mask_sequence, 5 for icepop, 1.001 for reject.", gt=0
    )

    group_size: int = setting(8, "Completions of a prompt, which are compared with each other.", unit="completions", ge=1)
    batch_size: int = setting(64, "Completions of one update: a multiple of group_size.", unit="completions", gt=0)
    mini_batches: int = setting(1, "Updates for which the completions of one rollout are divided.", ge=1)
    rollout_epochs: int = setting(
        1, "How often each completion of a rollout is trained on; mini-batches are drawn anew each time.", ge=1
    )
    temperature: float = setting(1.0, "Temperature of sampling, and of the log-probabilities in training.", gt=0)
    top_p: float = setting(1.0, "Must be 1: tokens that truncation leaves out have no ratio of policies.", gt=0, le=1)
    top_k: int = setting(0, "Must be 0, for the same reason as top_p.", ge=0)
    max_tokens: int = setting(256, "Longest completion.", unit="tokens", ge=1)
    stop: list[str] | None = setting(None, "Texts at which a completion ends; absent: those of its task.")
    truncated: Literal["judge", "zero", "drop"] = setting(
        "judge",
        "Treatment of a completion that is cut at max_tokens. judge: as any other; zero: its reward is 0; drop: it is left "
        "out.",
    )
    dynamic_sampling: bool = setting(False, "Sample other prompts for groups whose rewards are all equal (DAPO).")
    most_refills: int = setting(
        3,
        "dynamic_sampling: most rounds of further prompts in one rollout; after them, groups with equal rewards fill the "
        "batch.",
        ge=1,
    )
    min_entropy: float | None = setting(
        None, "Stop the run when the mean entropy of a sampled token, in nats, falls below this.", affects_output=False, gt=0
    )
    max_entropy: float | None = setting(
        None, "Stop the run when the mean entropy of a sampled token, in nats, rises above this.", affects_output=False, gt=0
    )
    max_kl: float | None = setting(
        None,
        "Stop the run when the mean log-ratio of a token to the initial model exceeds this; needs beta.",
        affects_output=False,
        gt=0,
    )
    cpu_kernels: Literal["auto", "on", "off"] = setting(
        "auto",
        "Whether sampling uses compiled kernels. auto: if they support the whole model, and dtype is float32; off: the "
        "model's own modules.",
    )
    sampler_weights: Literal["policy", "int8", "int4", "fp8"] = setting(
        "policy",
        "Weights of the blocks while the policy samples: its own, or rounded to 8 or 4 bits or float8 at each rollout, in one "
        "process. Log-probabilities then differ: see `log_ratio` and `log_ratio_over_cap`, and keep a correction.",
    )
    bitwise_consistent: bool = setting(
        False,
        "Compute sampler and trainer by the same batch-invariant kernels, and stop the run at a step where a log-probability "
        "differs in a single bit: for dense models in float32 on a processor (docs/batch-invariance.md).",
    )

    sleep: bool = setting(
        False,
        "Free the memory of the sampler's KV cache while training; where nothing is given, true on a GPU.",
        affects_output=False,
    )

    epochs: float = setting(1.0, "Passes over the prompts; without effect when steps is given.", gt=0)
    optimizer: str = setting("adamw", "As in pretrain.", code=True)
    learning_rate: float = setting(1e-6, "Peak learning rate.", gt=0)
    weight_decay: float = setting(0.0, "As in pretrain.", ge=0)
    context_length: int = setting(1024, "Most tokens of a prompt and its completion; longer prompts are left out.", gt=1)
    warmup_fraction: float | None = setting(
        0.0, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    decay_fraction: float | None = setting(
        0.0, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )
    skip_loss_spikes: Literal["always"] | bool = setting(False, "As in pretrain; gradient norms of rewards vary more.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "float32",
        "Dtype of matmuls; in another than float32 the sampler's log-probabilities differ from the trainer's. Where nothing is "
        "given, bfloat16 on a GPU that multiplies in it; the sampler then has a copy of the weights in it.",
    )
    compile: Literal["auto"] | bool = setting(False, "Compile the blocks; rows have a new length at each rollout.")

    def output_settings(self) -> dict[str, Any]:
        """As of `Config`; without settings that came later where they have their defaults, so that stages that are made keep
        their keys."""
        settings = super().output_settings()
        for name, is_default in {
            "rollouts": self.rollouts is None,
            "environment_options": not self.environment_options,
            "sampler_weights": self.sampler_weights == "policy",
            "bitwise_consistent": not self.bitwise_consistent,
            "weighted_divergence": not self.weighted_divergence,
        }.items():
            if is_default:
                del settings[name]
        return settings

    def plugins(self) -> list[tuple[str, str]]:
        """As of `Config`, with the source of the environment."""
        source = "" if self.environment is None or is_user_function(self.environment) else self.environment.partition(":")[0]
        return sorted([*super().plugins(), *([("bessemer.environments", source)] if source else [])])

    @property
    def packed(self) -> bool:
        """Whether rows hold several completions that do not attend to each other."""
        return True

    @property
    def _has_rewards_to_go(self) -> bool:
        """Whether advantages may differ by token without a critic, as those of another package may."""
        others = {*BUILT_IN_ADVANTAGES} - {"reinforce_pp", "reinforce_pp_baseline"}
        replaced = self.critic is not None or self.pair_loss is not None or self.reward_scale == "decoupled"
        return not replaced and self.advantage not in others

    @property
    def groups(self) -> int:
        """Prompts of one rollout."""
        return self.batch_size * self.mini_batches // self.group_size

    @property
    def updates(self) -> int:
        """Steps that use one rollout."""
        return self.mini_batches * self.rollout_epochs

    @field_validator("rollouts", mode="before")
    @classmethod
    def _listed_servers(cls, value: Any) -> Any:
        return {"servers": [value] if isinstance(value, str) else value} if isinstance(value, str | list) else value

    @field_validator("rewards", mode="before")
    @classmethod
    def _named_rewards(cls, value: Any) -> Any:
        return named(value)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """The method's settings, where they are not given."""
        if not isinstance(values, Mapping):
            return values
        name = values.get("algorithm", "grpo")
        if isinstance(name, str) and name not in PRESETS:
            raise ValueError(f"there is no algorithm {name!r}{nearest(name, list(PRESETS))}")
        merged = {**PRESETS.get(name, {}), **values}
        if isinstance(merged.get("pair_loss"), str) and "beta" not in values:
            merged["beta"] = default_beta(merged["pair_loss"])
        critic = merged.get("critic")
        if merged.get("adapter") is not None and isinstance(critic, Mapping):
            # the critic has no adapter, and an adapter's learning rate is ten times that of full tuning
            merged["critic"] = {"learning_rate_factor": 1.0, **critic}
        return merged

    @model_validator(mode="after")
    def _check_bitwise(self) -> Self:
        if not self.bitwise_consistent:
            return self
        parallel = self.parallel
        split = next((axis for axis in ("context", "tensor", "pipeline", "expert") if getattr(parallel, axis) > 1), None)
        refused = {
            f"dtype {self.dtype}: take float32": self.dtype != "float32",
            "compile: true: a compiler chooses the order of sums; take false": self.compile is not False,
            f"sampler_weights: {self.sampler_weights}: rounded weights are another model's": self.sampler_weights != "policy",
            "cpu_kernels: off: they are the kernels that both compute by": self.cpu_kernels == "off",
            "adapter.dora: norms of rows have no fixed order": self.adapter is not None and self.adapter.dora,
            "adapter.quantize: weights in codes are rounded otherwise": self.adapter is not None
            and self.adapter.quantize is not None,
            "activation_checkpointing: selective: take full or none": self.activation_checkpointing == "selective",
            f"parallel.{split}: take data_replicate or data_shard": split is not None,
            "pair_loss: no ratio of policies is in it": self.pair_loss is not None,
            "rollouts: servers sample by kernels of their own; sample in this process": self.rollouts is not None,
        }
        for reason, holds in refused.items():
            if holds:
                raise ValueError(f"bitwise_consistent does not go with {reason}")
        return self

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        self.check_sampled_adapter(self.cpu_kernels)
        if self.top_p != 1 or self.top_k:
            raise ValueError(
                "top_p and top_k: rl samples from the whole distribution, since the ratio of policies is not known for tokens "
                "that truncation leaves out; lower temperature instead"
            )
        if self.batch_size % self.group_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of group_size {self.group_size}")
        if self.max_tokens >= self.context_length:
            raise ValueError(
                f"max_tokens {self.max_tokens:,} leaves no room for a prompt in context_length {self.context_length:,}"
            )
        if self.batch_size_warmup is not None:
            raise ValueError("batch_size_warmup: the rows of rl are of one number; leave it out")
        if self.early_stopping_patience is not None or self.save == "best":
            raise ValueError("early_stopping_patience and save: best go by a validation loss, which rl has not; leave them out")
        if self.discount != 1 and not self._has_rewards_to_go:
            raise ValueError("discount: of the advantages reinforce_pp and reinforce_pp_baseline; a critic has its own")
        if self.weighted_divergence and (not self.beta or self.kl == "reward" or self.pair_loss is not None):
            raise ValueError(
                "weighted_divergence: of a divergence in the loss: set beta above 0 and kl: loss, without pair_loss"
            )
        if self.max_kl is not None and not self.beta:
            raise ValueError("max_kl needs a reference to measure against: set beta above 0")
        compares = self.critic is None and (self.advantage != "reinforce_pp" or self.reward_scale == "decoupled")
        if self.group_size < 2 and (compares or self.dynamic_sampling):
            what = "dynamic_sampling" if self.dynamic_sampling else f"advantage {self.advantage}"
            raise ValueError(f"{what} compares the completions of a prompt: group_size must be 2 or more")
        if self.pair_loss is not None:
            unused = {
                "critic": self.critic is not None,
                "max_kl": self.max_kl is not None,
                "entropy_weight": self.entropy_weight > 0,
                "reward_scale": self.reward_scale == "decoupled",
            }
            for what, is_given in unused.items():
                if is_given:
                    raise ValueError(f"{what}: not with pair_loss, which has neither advantages nor a divergence of its own")
        if self.rollouts is not None and self.rollouts.max_staleness and self.correction == "none" and self.pair_loss is None:
            raise ValueError(
                "rollouts: max_staleness: older weights than those that are trained take a correction; truncate is the default"
            )
        if self.rollouts is not None and self.sampler_weights != "policy":
            raise ValueError(f"sampler_weights: {self.sampler_weights}: servers have weights of their own; leave it out")
        if self.critic is not None and self.reward_scale == "decoupled":
            raise ValueError("reward_scale: decoupled makes one advantage of a completion; a critic makes those of tokens")
        return self
