import subprocess
import sys

import pytest

from bessemer.core.errors import ConfigError
from bessemer.training.pretrain_config import PretrainConfig


@pytest.mark.parametrize("given", [{}, {"steps": 1, "minutes": 1}, {"tokens": 1, "steps": 1}])
def test_exactly_one_length_is_wanted(given):
    with pytest.raises(ConfigError, match="exactly one of steps, tokens and minutes"):
        PretrainConfig.parse(given, "pretrain")


def test_what_cannot_change_the_weights_stays_out_of_the_key():
    quiet = PretrainConfig(steps=1, threads=3, log_every=9, checkpoint_minutes=9)
    assert quiet.output_settings() == PretrainConfig(steps=1).output_settings()
    assert PretrainConfig(steps=1, dtype="float32").output_settings() != PretrainConfig(steps=1).output_settings()


def test_settings_are_read_without_torch():
    code = "import sys, bessemer.training.config, bessemer.posttraining.sft.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("retired", "name"),
    [
        ("skip_outliers", "skip_loss_spikes"),
        ("width_base", "mup_base_width"),
        ("observe_every", "diagnostics_every"),
    ],
)
def test_a_retired_setting_is_refused_with_its_new_name(retired, name):
    with pytest.raises(ConfigError, match=f"the setting '{retired}' is now '{name}'"):
        PretrainConfig.parse({"steps": 1, retired: 1}, "pretrain")


def test_checkpoints_are_seldom_in_runs_that_take_hours():
    config = PretrainConfig(steps=1)
    assert (config.minutes_between_checkpoints(3600), config.minutes_between_checkpoints(4 * 3600)) == (1, 30)
    assert config.with_changes(checkpoint_minutes=5).minutes_between_checkpoints(4 * 3600) == 5
