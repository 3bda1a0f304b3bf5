"""Settings of the rewards, the rewards by name, and settings of the stage `reward`.

A reward is loaded when it is made: checking a recipe loads none. Imports no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from bessemer.core.config import ChosenSettings, Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry
from bessemer.core.usercode import is_user_function
from bessemer.posttraining.chat_models import chat_models_fingerprint, model_place, place_fingerprint
from bessemer.posttraining.data.made import ON_BAD_ROW, PLACES, OnBadRow, checked_pairs
from bessemer.tasks.judged import CriterionConfig, JudgeConfig
from bessemer.tasks.questions import GenerationQuestion, GenerationTask
from bessemer.tasks.verifiers import Numeric, Verifier, checked_pattern
from bessemer.training.adapter_config import TuningConfig

#: The entry points by which other packages add rewards.
GROUP = "bessemer.rewards"


class RewardSettings(Config):
    """Settings of every reward."""

    shorthand: ClassVar[str | None] = "reward"

    reward: str = setting(..., "kind of reward, or your own file.py:function with the signature of TRL's", code=True)
    weight: float = setting(1.0, "factor in the sum of the rewards", allow_inf_nan=False)
    seconds: float = setting(10.0, "time for one call; a completion whose reward takes longer is dropped", unit="seconds", gt=0)

    def plugins(self) -> list[tuple[str, str]]:
        own = [] if is_user_function(self.reward) else [(GROUP, self.reward)]
        return sorted({*super().plugins(), *own})


class TaskReward(RewardSettings):
    """The headline score, from 0 to 1, that the prompt's task gives the answer."""

    reward: Literal["task"] = setting("task", "kind of reward")
    seconds: float = setting(600.0, "time for one call, programs that the task runs included", unit="seconds", gt=0)


class PatternReward(RewardSettings):
    """1 where a regular expression finds something, else 0."""

    reward: Literal["regex"] = setting("regex", "kind of reward")
    pattern: str = setting(description="Python regular expression; a dot also matches newlines")
    whole: bool = setting(False, "it must match the whole completion")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return checked_pattern(pattern)


class AnswerReward(RewardSettings):
    """1 where the completion gives the answer of a column of the data, else 0."""

    reward: Literal["answer"] = setting("answer", "kind of reward")
    column: str = setting("answer", "column of the right answer, a text or a list of them; a text may end in GSM8K's `#### 7`")
    verifier: Verifier = setting(
        default_factory=Numeric, description="how an answer is compared: exact, contains, numeric or regex"
    )


class JSONSchemaReward(RewardSettings):
    """1 where the completion is JSON that fits a schema, else 0."""

    reward: Literal["json_schema"] = setting("json_schema", "kind of reward")
    json_schema: dict[str, Any] | None = setting(None, "the schema; none: that of the column `json_schema`, else any JSON")
    fenced: bool = setting(True, "the JSON may stand in a fenced block, with text around it")


class FormatReward(RewardSettings):
    """1 where the completion is made of the named parts, each once, in order, in tags of their names, else 0; with `text_after`
    some text stands behind them."""

    reward: Literal["format"] = setting("format", "kind of reward")
    tags: list[str] = setting(
        default_factory=lambda: ["think", "answer"],
        description="names of the parts: <think>…</think><answer>…</answer>",
        min_length=1,
    )
    text_after: bool = setting(
        False, "text without tags must follow the parts, as the answer behind <think>…</think> that chat models write"
    )


class LengthReward(RewardSettings):
    """1 for a completion of a wanted length, falling to 0 over a number of tokens beyond."""

    reward: Literal["length"] = setting("length", "kind of reward")
    at_least: int = setting(0, "fewest tokens", unit="tokens", ge=0)
    at_most: int | None = setting(None, "most tokens; none: any number", unit="tokens", ge=1)
    falloff: int = setting(16, "tokens over the most at which the reward reaches 0", unit="tokens", ge=1)

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.at_most is None and not self.at_least:
            raise ValueError("length: say at_least, at_most or both")
        if self.at_most is not None and self.at_most < self.at_least:
            raise ValueError(f"length: at_most ({self.at_most}) is below at_least ({self.at_least})")
        return self


class OverlongReward(RewardSettings):
    """DAPO's soft punishment of long completions: 0 up to longest − band tokens, then falling to −1 at longest and above."""

    reward: Literal["overlong"] = setting("overlong", "kind of reward")
    longest: int = setting(description="length from which the reward is −1", unit="tokens", ge=1)
    band: int = setting(
        description="number of tokens below that length over which the reward falls from 0", unit="tokens", ge=1
    )

    @model_validator(mode="after")
    def _band_fits(self) -> Self:
        if self.band > self.longest:
            raise ValueError(f"overlong: band ({self.band}) exceeds longest ({self.longest})")
        return self


class RepetitionReward(RewardSettings):
    """Minus the share of a completion's runs of tokens that repeat earlier ones (Yeo et al. 2025)."""

    reward: Literal["repetition"] = setting("repetition", "kind of reward")
    run: int = setting(3, "tokens of the runs whose repetition is counted", unit="tokens", ge=1)


class ProgramReward(RewardSettings):
    """1 where the code of the completion passes the tests of its row, in the sandbox, else 0."""

    reward: Literal["program"] = setting("program", "kind of reward")
    sandbox: Literal["namespaces", "landlock", "seccomp", "rlimits"] = setting(
        "landlock", "weakest tier of the sandbox in which code is run; below it the reward is refused", affects_output=False
    )
    program_seconds: float = setting(10.0, "time for one program, its tests included", unit="seconds", gt=0)
    memory: int = setting(1 << 30, "most memory of one program", unit="bytes", ge=1 << 26)
    seconds: float = setting(600.0, "time for all programs of one call", unit="seconds", gt=0)


class ModelReward(RewardSettings):
    """What a model judges."""

    judge: JudgeConfig = setting(description="the judging model: a folder on this machine, or a name at a URL")
    seconds: float = setting(600.0, "time for all judgements of one call", unit="seconds", gt=0)


class JudgeReward(ModelReward):
    """A model's rating of the completion, from 1 to 5, as 0 to 1."""

    reward: Literal["judge"] = setting("judge", "kind of reward")
    criterion: str | None = setting(None, "criterion of the judge, in a sentence; none: correctness and helpfulness")
    reference: str | None = setting(None, "column of a right answer, which the judge is shown; none: none")


class RubricReward(ModelReward):
    """The weighted share of criteria that a model finds met, from 0 to 1 (Gunjal et al. 2025)."""

    reward: Literal["rubric"] = setting("rubric", "kind of reward")
    criteria: list[CriterionConfig | str] = setting(
        default_factory=list, description="questions about an answer, answered yes or no, with weights, for all prompts"
    )
    column: str | None = setting(None, "column of a prompt's own criteria: a list of questions, or of {question, weight}")
    reference: str | None = setting(None, "column of a right answer, which the judge is shown; none: none")

    @model_validator(mode="after")
    def _has_criteria(self) -> Self:
        if not self.criteria and self.column is None:
            raise ValueError("rubric: give criteria, or the column of a prompt's own")
        return self


class RewardModelReward(RewardSettings):
    """The score of a trained reward model."""

    reward: Literal["reward_model"] = setting("reward_model", "kind of reward")
    model: str | None = setting(
        None, "folder of the reward model, such as runs/NAME/reward_model; none: that of the stage `reward` above"
    )
    seconds: float = setting(600.0, "time for one call", unit="seconds", gt=0)


class EnvironmentReward(RewardSettings):
    """The reward that the environment gave the episode."""

    reward: Literal["environment"] = setting("environment", "kind of reward")


class UserReward(RewardSettings):
    """A function of the user's own, with the signature of TRL's reward functions."""


def _settings_of(name: str) -> tuple[str, type[RewardSettings]]:
    """The tag and the settings of a reward's name."""
    if is_user_function(name) or name == _USER:
        return _USER, UserReward

    settings = REWARDS.find(name).settings
    if settings is None or not issubclass(settings, RewardSettings):
        raise ConfigError(f"the settings of the reward {name!r} are not RewardSettings")
    return name, settings


_USER = "user"

#: Settings of one reward, of the class that its plugin names.
Reward: TypeAlias = Annotated[RewardSettings, ChosenSettings("reward", _settings_of)]


def named(value: Any) -> Any:
    """Settings of rewards, of which a bare word is one without settings: `rewards: [task, brief.py:brief]`."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    return [{"reward": each} if isinstance(each, str) else each for each in value]


#: Rewards of a stage, at least one.
Rewards: TypeAlias = Annotated[list[Reward], Field(min_length=1)]


#: TRL's interface: keywords `completions`, `prompts`, `completion_ids` and the data's columns; returns a number per completion.
RewardFunction = Callable[..., Sequence[float | None]]


class RewardTask(NamedTuple):
    """A task whose questions are prompts, and these by the number of their item."""

    task: GenerationTask
    questions: Mapping[int, GenerationQuestion]


@dataclass(frozen=True)
class RewardContext:
    """Context in which a reward is built. folder: where files of the user's lie. tasks: by name. reward_model: the
    folder of the one that the stage `reward` has made."""

    folder: Path = Path()
    tasks: Mapping[str, RewardTask] = field(default_factory=dict)
    reward_model: Path | None = None


#: Builds a reward function from its settings and context.
RewardFactory = Callable[[Any, RewardContext], RewardFunction]

_RULES, _MODELS = "bessemer.posttraining.rewards.rule_based", "bessemer.posttraining.rewards.model_based"

REWARDS: Registry[RewardFactory] = Registry(
    "reward",
    GROUP,
    [
        Plugin("task", "the score of the task that a prompt is of", f"{_RULES}:task_reward", TaskReward),
        Plugin("answer", "the right answer of a column, exact or a number", f"{_RULES}:answer_reward", AnswerReward),
        Plugin("program", "code that passes its tests", f"{_RULES}:program_reward", ProgramReward),
        Plugin("regex", "a regular expression that matches", f"{_RULES}:pattern_reward", PatternReward),
        Plugin("json_schema", "JSON that fits a schema", f"{_RULES}:json_schema_reward", JSONSchemaReward),
        Plugin("format", "parts in tags, each once, in order", f"{_RULES}:format_reward", FormatReward),
        Plugin("length", "a wanted number of tokens", f"{_RULES}:length_reward", LengthReward),
        Plugin("overlong", "DAPO's punishment of long answers", f"{_RULES}:overlong_reward", OverlongReward),
        Plugin("repetition", "minus the share of repeated runs", f"{_RULES}:repetition_reward", RepetitionReward),
        Plugin("judge", "a model's rating of the answer", f"{_MODELS}:judge_reward", JudgeReward),
        Plugin("rubric", "criteria that a model finds met", f"{_MODELS}:rubric_reward", RubricReward),
        Plugin(
            "reward_model",
            "the score of a trained reward model",
            f"{_MODELS}:reward_model_reward",
            RewardModelReward,
        ),
        Plugin(
            "environment",
            "what the environment of an episode says",
            f"{_RULES}:environment_reward",
            EnvironmentReward,
        ),
    ],
)


def rewards_fingerprint(rewards: Sequence[RewardSettings], folder: Path) -> list[dict[str, str]]:
    """Hashes of the files of those models of rewards that lie on this machine. Raises ConfigError for one that does not."""
    judges = chat_models_fingerprint([reward.judge for reward in rewards if isinstance(reward, ModelReward)], folder)
    scorers = [reward.model for reward in rewards if isinstance(reward, RewardModelReward) and reward.model is not None]
    return [*judges, *(place_fingerprint(model_place(model, folder)) for model in scorers)]


#: Raised when the same settings and inputs give other weights than before.
REWARD_VERSION = 7


class RewardConfig(TuningConfig):
    """The stage `reward`: a reward model from pairs of a chosen and a rejected answer. The defaults suit a real model."""

    shorthand: ClassVar[str | None] = "data"
    # ten times that of full tuning, as in the other stages
    adapter_learning_rate: ClassVar[float] = 1e-4

    data: list[str] = setting(
        description="Pairs: " + PLACES + ": {prompt, chosen, rejected}, in messages or "
        "texts; made/mismatched, of the conversations of sft; made/preferences and made/honesty, of stages above. A row may "
        "have a margin (by how much the chosen answer is better), a confidence (how probably it is), and a weight.",
        min_length=1,
    )
    centering: float = setting(
        0.0, "Weight of the mean squared sum of a pair's rewards, which keeps rewards near 0 (0.01 is usual).", ge=0
    )
    validation_share: float = setting(
        0.05, "Fraction of the prompts whose pairs are held out; all pairs of a prompt are on the same side.", ge=0, lt=1
    )
    on_bad_row: OnBadRow = setting("skip", ON_BAD_ROW)
    epochs: float = setting(1.0, "Passes over the pairs; without effect when steps is given.", gt=0)

    optimizer: str = setting("adamw", "As in pretrain.", code=True)
    learning_rate: float = setting(1e-5, "Peak learning rate.", gt=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay of matrices.", ge=0)
    context_length: int = setting(
        1024, "Tokens of a row, which holds whole pairs: an answer with its prompt at most half.", gt=1
    )
    warmup_fraction: float | None = setting(
        0.1, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    decay_fraction: float | None = setting(
        0.9, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )

    @property
    def packed(self) -> bool:
        """Whether rows hold several conversations that do not attend to each other."""
        return True

    @property
    def scores(self) -> bool:
        """Whether the model that is trained has a scalar head, `score`, in place of its language head."""
        return True

    @field_validator("data")
    @classmethod
    def _known_data(cls, names: list[str]) -> list[str]:
        return checked_pairs(names)

    @model_validator(mode="after")
    def _check_merged(self) -> Self:
        if self.adapter is not None and not self.adapter.merge:
            raise ValueError("adapter.merge: false: a reward model is its adapter and its head, merged in model/; leave it out")
        if self.z_loss:
            raise ValueError("z_loss is of losses of the next token, which a reward model has not; leave it out")
        if self.keep_better is not None:
            raise ValueError("keep_better: a reward model starts from one that has no scores to compare with; leave it out")
        return self

    @field_validator("tasks")
    @classmethod
    def _no_tasks(cls, names: list[str]) -> list[str]:
        if names:
            raise ValueError("a reward model writes no text, so it can answer no tasks")
        return names
