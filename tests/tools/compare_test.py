import json
import os
from contextlib import nullcontext
from pathlib import Path

import compare
import page_cache
import peers
import pytest
import torch
from compare import LEAST_SAMPLES, ROOFLINE, Results
from page_cache import PageCacheError
from support import assert_bit_equal

ROOT = Path(compare.__file__).parent.parent
SMALL = {"layers.0.q": torch.randn(300, 70, dtype=torch.bfloat16), "layers.0.norm": torch.randn(70).bfloat16()}
PEER = "safetensors 0.8.0 + clone"


@pytest.fixture
def files(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "decoder_tensors", lambda size_gib: dict(SMALL))
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "peers")
    (tmp_path / "files").mkdir()
    compare.make_files(tmp_path / "files", 1)
    return tmp_path / "files"


def write_times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_files_are_made_once_and_anew_for_another_generator(files, monkeypatch):
    stale = files / "model-00001-of-00002.safetensors"
    stale.write_bytes(b"")
    before = write_times(files)
    compare.make_files(files, 1)
    assert write_times(files) == before
    monkeypatch.setattr(compare, "decoder_shapes", lambda size_gib: {"q": (1, 2)})
    compare.make_files(files, 1)
    after = write_times(files)
    assert after.keys() == before.keys() - {stale.name}
    assert all(after[name] != before[name] for name in after)


def test_the_file_of_tensorizer_is_made_as_soon_as_the_package_is_there_and_a_failure_has_its_reason(
    files, monkeypatch, tmp_path
):
    program = tmp_path / "python"
    monkeypatch.setattr(compare.sys, "executable", str(program))
    program.write_text('#!/bin/sh\necho "no such module" >&2; exit 1\n')
    program.chmod(0o755)
    compare.make_files(files, 1)
    peers.folder_of(compare.TENSORIZER).mkdir(parents=True)
    with pytest.raises(RuntimeError, match="cannot make its file: no such module"):
        compare.make_files(files, 1)
    program.write_text(f'#!/bin/sh\necho "$2 $3" >>{files / compare.TENSORIZER_FILE}\n')
    for _ in range(2):
        compare.make_files(files, 1)
    assert (files / compare.TENSORIZER_FILE).read_text() == "--worker serialize\n"


@pytest.mark.parametrize(
    "name",
    [
        *(name for name, loader in compare.LOADERS.items() if loader.ours),
        PEER,
        "torch.load",
        "torch.load, mmap=True + clone",
    ],
)
def test_contenders_load_what_the_files_have(name, files):
    answer, tensors = compare.timed_load(compare.LOADERS[name], files, "page cache")
    assert_bit_equal(dict(tensors), SMALL)
    assert answer["bytes"] == sum(tensor.nbytes for tensor in SMALL.values())


def test_a_load_of_our_own_file_that_is_not_verified_says_so():
    of_our_own = {
        name: loader.load.keywords
        for name, loader in compare.LOADERS.items()
        if getattr(loader.load, "keywords", {}).get("file") == compare.OWN_FILE and loader.ours
    }
    assert len(of_our_own) == 3
    for name, options in of_our_own.items():
        assert ("not verified" in name) == (options.get("verify") == "never"), name


def answer_of(checksum, seconds=1.0):
    load = {"seconds": seconds, "cpu_seconds": 0.5, "bytes": 2_000_000_000, "peak_mib": 0.0, "checksum": checksum}
    return {"first": load, "second": load}


def test_a_peer_that_loads_other_bytes_is_out_and_is_named(monkeypatch, tmp_path):
    answers = {"flashpack": answer_of(1), PEER: answer_of(2), ROOFLINE: {"first": answer_of(None, 0.5)["first"]}}
    monkeypatch.setattr(compare, "sample", lambda name, *_: answers[name])
    results = Results({"Run:ai 0.17.0": "cannot be installed: no network"})
    for name in [ROOFLINE, "flashpack", PEER, "Run:ai 0.17.0"]:
        results.take(name, "cold", tmp_path)
    report = compare.machine(tmp_path) | {"command": "the command"} | compare.report(results)
    assert report["rows"].keys() == {ROOFLINE, "flashpack"}
    assert report["rows"]["flashpack"]["cold"]["first_gb_per_s"] == 2.0
    text = compare.as_markdown(json.loads(json.dumps(report)))
    assert f"{report['cpus']} cores of {report['cpu']}, {report['file_system']}, Linux" in text
    assert "| roofline | 4.00 |  |  |  |  |\n" in text
    assert "| flashpack | 2.00 | 2.00 | 0.25 | 0.00 | 0.50, 0.50 |\n" in text
    assert f"| {PEER} | {PEER} loaded other bytes" in text
    assert "first load:" not in text, "there is no peer left to judge by"
    assert "no network" in text


def take_rates(monkeypatch, rates):
    results = Results({})
    for name, (first, second) in rates.items():
        for pair in zip(first, second, strict=True):
            loads = [answer_of(1, 2 / rate)["first"] for rate in pair]
            monkeypatch.setattr(compare, "sample", lambda *_, loads=loads: {"first": loads[0], "second": loads[1]})
            results.take(name, "cold", None)
    return compare.report(results)["verdicts"]


def test_the_verdict_names_the_peers_that_are_faster_and_says_if_that_is_noise(monkeypatch):
    stream, mapped = "flashpack, stream", "safetensors 0.8.0, mapped, all pages touched"
    first, second = take_rates(
        monkeypatch,
        {
            "flashpack": ([2.0, 2.1, 2.2], [2.0, 2.1, 2.2]),
            stream: ([4.0, 4.1, 4.2], [3.0, 3.1, 3.2]),
            PEER: ([2.3, 2.4, 2.5], [1.0, 1.1, 1.2]),
            "torch.load": ([2.1, 2.2, 2.3], [1.0, 1.1, 1.2]),
            mapped: ([9.0, 9.0, 9.0], [9.0, 9.0, 9.0]),
            "flashpack, into tensors that are there": ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        },
    )
    assert first["faster"] == [f"{PEER} than flashpack"]
    assert first["faster_within_noise"] == ["torch.load than flashpack"]
    assert compare.said(first) == (
        f"cold, first load: faster: {PEER} than flashpack; torch.load than flashpack, within the noise"
    )
    assert compare.said(second) == "cold, second load: no median of 2 peers is greater than any of ours"


def test_two_rounds_are_too_few_to_judge_and_a_peer_that_was_faster_in_both_is_named(monkeypatch):
    first, second = take_rates(monkeypatch, {"flashpack": ([2.0, 2.1], [2.0, 2.1]), PEER: ([9.0, 9.1], [1.0, 1.1])})
    assert first["faster"] == first["faster_within_noise"] == []
    assert first["faster_in_too_few_samples"] == [f"{PEER} than flashpack"]
    few = "too few samples to judge, 2 where 3 are the least"
    assert compare.said(first) == f"cold, first load: {few}; faster: {PEER} than flashpack, in every sample"
    assert compare.said(second) == f"cold, second load: {few}"


def recorded():
    return json.loads((ROOT / "bench" / "compare.json").read_text())


def test_the_run_that_the_readmes_show_has_the_verdicts_of_its_samples():
    found, results = recorded(), Results({})
    for name, states in found["rows"].items():
        for state, row in states.items():
            results.samples[name, state] = [
                {turn: answer_of(1, 2 / of)["first"] for turn, of in zip(("first", "second"), pair, strict=False)}
                for pair in row["samples"]
            ]
    assert found["verdicts"] == compare.report(results)["verdicts"]


@pytest.mark.parametrize("page", ["README.md", "bench/README.md"])
def test_a_readme_names_the_peers_that_were_faster_in_every_sample_of_that_run(page):
    verdicts = recorded()["verdicts"]
    pairs = [pair for found in verdicts for pair in found["faster"] + found["faster_in_too_few_samples"]]
    paragraphs = (ROOT / page).read_text().split("\n\n")
    for peer, ours in (pair.split(" than ") for pair in pairs):
        assert any(f"`{peer}`" in paragraph and f"`{ours}`" in paragraph for paragraph in paragraphs), (peer, ours)


def test_a_run_names_what_it_left_out_and_the_command_with_all_that_it_was_given(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "make_files", lambda *_: None)
    monkeypatch.setattr(compare, "sample", lambda name, *_: answer_of(None if name == ROOFLINE else 1))
    given = ["--dir", str(tmp_path), "--rounds", "1", "--states", "page cache", "--only", "flashpack", "torch.load"]
    monkeypatch.setattr("sys.argv", ["compare.py", *given, "--out", str(tmp_path / "out")])
    assert compare.main() == 0
    found = json.loads((tmp_path / "out.json").read_text())
    left_out = {name for name, reason in found["missing"].items() if reason == "not selected"}
    assert left_out == {*compare.LOADERS, "cold", "half cached"} - {"flashpack", "torch.load"}
    assert "GPU" in found["missing"]["InstantTensor 0.2.2"]
    text = (tmp_path / "out.md").read_text()
    assert (
        f"`bench/compare.py --dir {tmp_path} --rounds 1 --states 'page cache' --only flashpack torch.load --out" in text
    )
    assert f"| {PEER} | not selected |" in text


@pytest.mark.parametrize("name", [PEER, "flashpack"])
def test_without_a_row_of_ours_or_a_peer_there_is_no_verdict(name, monkeypatch):
    assert take_rates(monkeypatch, {name: ([1.0], [1.0])}) == []


def test_our_own_wrong_bytes_stop_the_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "sample", lambda name, *_: answer_of(1 if name == PEER else 2))
    results = Results({})
    results.take(PEER, "cold", tmp_path)
    with pytest.raises(RuntimeError, match="other bytes"):
        results.take("flashpack", "cold", tmp_path)


@pytest.mark.parametrize("is_the_peers", [False, True])
def test_a_page_cache_that_is_not_as_wanted_twice_ends_the_comparison_unless_only_the_peer_has_it(
    is_the_peers, monkeypatch, tmp_path
):
    def prepare(*_):
        if not is_the_peers:
            raise PageCacheError("all stayed")

    answers = iter([PageCacheError("half stayed"), answer_of(1), *[PageCacheError("half stayed")] * 2])

    def sample_once(*_):
        if isinstance(answer := next(answers), PageCacheError):
            raise answer
        return answer

    monkeypatch.setattr(compare, "sample_once", sample_once)
    monkeypatch.setattr(compare, "prepare", prepare)
    results = Results({})
    results.take(PEER, "cold", tmp_path)
    assert len(results.samples[PEER, "cold"]) == 1
    with nullcontext() if is_the_peers else pytest.raises(PageCacheError, match="all stayed"):
        results.take(PEER, "cold", tmp_path)
    assert results.reasons == ({PEER: "half stayed"} if is_the_peers else {})


def test_a_peer_that_fails_late_has_no_say_in_whether_there_are_enough_samples(monkeypatch, tmp_path):
    results = Results({})
    monkeypatch.setattr(compare, "sample", lambda *_: answer_of(1))
    for _ in range(LEAST_SAMPLES):
        results.take("flashpack", "cold", tmp_path)
    results.take(PEER, "cold", tmp_path)
    results.reasons[PEER] = "died"
    assert compare.verdict(results, "cold", "first")["samples"] == LEAST_SAMPLES


def test_a_cold_load_from_a_file_that_stays_cached_is_an_error(monkeypatch, files):
    monkeypatch.setattr(page_cache, "drop_from_page_cache", lambda path: 0.5)
    with pytest.raises(RuntimeError, match="stayed in the page cache"):
        compare.timed_load(compare.LOADERS["flashpack"], files, "cold")


def test_before_each_load_from_the_page_cache_all_of_the_files_is_there(monkeypatch, files):
    paths = list(files.iterdir())
    for path in paths:
        page_cache.drop_from_page_cache(path)
    compare.prepare(files, "page cache")
    # A kernel that is short of memory takes some pages back before they are counted.
    sizes = [path.stat().st_size for path in paths]
    cached = [page_cache.resident_fraction(path) * size for path, size in zip(paths, sizes, strict=True)]
    assert sum(cached) >= 0.9 * sum(sizes)
    monkeypatch.setattr(page_cache, "LONGEST_WAIT_S", 0)
    monkeypatch.setattr(page_cache, "resident_fraction", lambda path: 0.98)
    with pytest.raises(RuntimeError, match=r"only 98% of .* is in the page cache"):
        compare.timed_load(compare.LOADERS["flashpack"], files, "page cache")


def test_before_a_load_of_half_the_first_half_of_each_file_is_cached_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 << 20))
    if page_cache.drop_from_page_cache(path) > 0:
        pytest.skip("this file system keeps its pages")
    compare.prepare(tmp_path, "half cached")
    # To read without waiting would say less: the kernel begins to read then, and a fast disk is done at once.
    pages = page_cache.resident_pages(path)
    half = len(pages) // 2
    assert sum(pages[:half]) >= 0.9 * half  # The kernel takes some back where memory is short.
    assert sum(pages[half:]) <= 0.04 * half


def test_half_a_file_that_is_not_so_cached_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(bytes(2 << 20))
    monkeypatch.setattr(page_cache, "drop_from_page_cache", lambda path: 0.0)
    monkeypatch.setattr(compare, "resident_fraction", lambda path: 0.9)
    with pytest.raises(RuntimeError, match=r"90% of .* is in the page cache, and half was wanted"):
        compare.prepare(tmp_path, "half cached")


@pytest.mark.parametrize("name", [name for name, loader in compare.LOADERS.items() if "into tensors" in name])
def test_a_load_into_tensors_has_only_what_it_loads_and_makes_no_others(name, files):
    loader = compare.LOADERS[name]
    room = loader.room(files)
    assert all(not torch.equal(room.tensors[name], tensor) for name, tensor in SMALL.items())
    places = {name: tensor.data_ptr() for name, tensor in room.tensors.items()}
    tensors = loader.load(files, room)
    assert_bit_equal(tensors, SMALL)
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == places


def test_the_program_measures_both_rooflines_of_a_file_and_without_it_there_is_that_of_the_page_cache(files, tmp_path):
    program = tmp_path / "program"
    assert compare.states_with_roofline(program) == ("page cache",)
    assert (
        compare.roofline(program, files, "page cache")["first"]["bytes"] == (files / "model.flashpack").stat().st_size
    )
    program.write_text("""#!/bin/sh\necho "{\\"asked\\": \\"$*\\"}"\n""")
    program.chmod(0o755)
    assert compare.states_with_roofline(program) == ("cold", "page cache")
    asked = compare.roofline(program, files, "page cache")["first"]["asked"]
    assert asked == f"cached {files / 'model.flashpack'}"
