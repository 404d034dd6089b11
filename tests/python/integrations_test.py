from __future__ import annotations

import sys
from types import SimpleNamespace

import flashpack
import pytest
from flashpack import utils


@pytest.mark.parametrize("installed", [set(), {"diffusers"}, {"transformers"}, {"diffusers", "transformers"}])
def test_those_libraries_are_patched_that_are_installed(installed, monkeypatch):
    patched = set()
    for library, function in {
        "diffusers": "patch_diffusers_auto_model",
        "transformers": "patch_transformers_auto_model",
    }.items():
        stand_in = SimpleNamespace(**{function: lambda library=library: patched.add(library)})
        monkeypatch.setitem(sys.modules, f"flashpack.integrations.{library}", stand_in)
    monkeypatch.setattr(utils, "find_spec", lambda name: name if name in installed else None)
    flashpack.patch_integrations()
    assert patched == installed
    assert flashpack.integrations.patch_integrations is flashpack.patch_integrations
