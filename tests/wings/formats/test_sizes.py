"""Sizes of networks, recognised from the shapes of their tensors."""

from dataclasses import replace

import families
import pytest
from families import FAMILIES

from scfg.formats.sizes import recognise


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_sizes_are_those_of_the_tensors(name):
    for config in (families.small(FAMILIES[name]), families.small(FAMILIES[name], vocabulary=600)):
        tensors = families.original(config)
        assert recognise(tensors) == config
        towers = tuple(tower.prefix for tower in config.text)
        without = {key: tensor for key, tensor in tensors.items() if not key.startswith(towers)}
        assert recognise(without) == replace(config, text=())
