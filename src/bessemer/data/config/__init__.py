"""Settings of the data stages: collect, clean, deduplicate, select. Nothing heavy is imported here."""

from bessemer.data.config.clean import CleanConfig as CleanConfig
from bessemer.data.config.collect import CollectConfig as CollectConfig
from bessemer.data.config.collect import Source as Source
from bessemer.data.config.collect import source_name as source_name
from bessemer.data.config.deduplicate import DeduplicateConfig as DeduplicateConfig
from bessemer.data.config.mixture import MixConfig as MixConfig
from bessemer.data.config.mixture import MixedConfig as MixedConfig
from bessemer.data.config.select import LimitConfig as LimitConfig
from bessemer.data.config.select import SelectConfig as SelectConfig
from bessemer.data.config.stage import DataConfig as DataConfig

#: Each is raised whenever its stage writes other bytes for the same input (golden outputs in the tests).
COLLECT_VERSION = 5
CLEAN_VERSION = 4
DEDUPLICATE_VERSION = 4
SELECT_VERSION = 5
