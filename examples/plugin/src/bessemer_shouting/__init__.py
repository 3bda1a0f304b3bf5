"""The filter's declaration. A recipe is checked against it without loading the filter's code."""

from bessemer.data.plugins import Column, FilterPlugin

PLUGIN = FilterPlugin(
    "shouting",
    "share of letters that are capitals",
    "bessemer_shouting.filter:shouting",
    columns={"shouting_capitals": Column("share of the letters that are capitals", limit=(None, 0.5))},
)
