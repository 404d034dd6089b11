"""What assign_from_file says about what it did."""

from __future__ import annotations

import dataclasses
import types

import flashpack
import pytest
import torch


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("inv_freq", torch.ones(4), persistent=False)


def test_a_load_of_everything_reports_it_and_how_the_bytes_came(pack):
    report = flashpack.assign_from_file(Model(), pack(Model()))
    assert isinstance(report, flashpack.AssignReport)
    assert sorted(report.assigned) == ["embed.weight", "head.bias", "scale"]
    assert (report.missing, report.unexpected, report.left_on_meta) == ((), (), ())
    assert report.stats["requested_bytes"] >= 4 * (40 + 10 + 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.missing = ()


@pytest.mark.parametrize("options", [{"mmap": True}, {"keep_flash_ref_on_model": True}], ids=str)
def test_other_ways_to_read_report_the_same(options, pack):
    report = flashpack.assign_from_file(Model(), pack(Model()), **options)
    assert len(report.assigned) == 3
    assert (report.stats is None) == ("mmap" in options)


def test_what_was_not_assigned_is_reported_but_for_what_was_to_be_ignored(pack):
    path = pack({"embed.weight": torch.ones(10, 4), "extra": torch.ones(1), "ignored": torch.ones(1)})
    report = flashpack.assign_from_file(Model(), path, strict=False, ignore_names=["ignored", "scale"])
    assert report.assigned == ("embed.weight",)
    assert report.missing == ("head.bias",)
    assert report.unexpected == ("extra",)


def test_what_is_left_on_the_meta_device_is_named_in_a_warning_that_points_to_the_caller(pack):
    with torch.device("meta"):
        model = Model()
    with pytest.warns(UserWarning, match=r"3 tensors are still on the meta device.*'scale', 'inv_freq'") as caught:
        report = flashpack.assign_from_file(model, pack({"embed.weight": torch.ones(10, 4)}), strict=False)
    assert caught[0].filename == __file__
    assert set(report.left_on_meta) == {"head.bias", "scale", "inv_freq"}


def test_the_report_is_shown_in_one_line_however_long_its_names(pack):
    report = flashpack.assign_from_file(Model(), pack({f"extra.{i}": torch.ones(1) for i in range(50)}), strict=False)
    shown = repr(report)
    assert "0 assigned" in shown
    assert "missing=['embed.weight', 'head.bias', 'scale']" in shown
    assert "'extra.4', and 45 more" in shown
    assert "\n" not in shown
    assert len(shown) < 300


class Spread(Model):
    """Says of its parameters that they are on several devices, of which a machine for tests may have only one."""

    def parameters(self, recurse=True):
        head = types.SimpleNamespace(is_meta=False, device=torch.device("cuda", 1))
        return iter([*super().parameters(recurse), head, torch.nn.Parameter(torch.ones(1, device="meta"))])


def test_a_warning_says_that_a_model_on_several_devices_is_taken_to_one(pack, caplog):
    path = pack(Model())
    for options in ({"device": "cpu"}, {"in_place": True}):
        flashpack.assign_from_file(Spread(), path, **options)
        flashpack.assign_from_file(Model(), path)
        assert caplog.text == ""  # The caller has said where they go, or they stay where they are.
    flashpack.assign_from_file(Spread(), path)
    (record,) = caplog.records
    said = "the parameters of Spread are on cpu and cuda:1, and the load takes them all to cpu; device="
    assert said in record.message
