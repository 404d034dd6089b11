import json
import signal
import sys

import contenders
import pytest
import torch
from page_cache import PageCacheError

DOUBLES = """
import contenders
contenders.serve(lambda job: {"job": job, "twice": 2 * int(job)})
"""


@pytest.fixture
def started():
    """(code of the process, ours or not) -> a contender, closed at the end."""
    open_ones = []

    def start(code, ours=False):
        path = [entry for entry in sys.path if entry]
        contender = contenders.Contender(
            "NAME", [sys.executable, "-c", f"import sys; sys.path += {path!r}\n{code}"], {}, ours
        )
        open_ones.append(contender)
        return contender

    yield start
    for contender in open_ones:
        contender.close()
        assert contender.process.returncode is not None


def accept(answer):
    pass


def refuse(answer):
    raise RuntimeError("wrong bytes")


def test_a_contender_answers_job_after_job(started):
    contender = started(DOUBLES)
    assert contender.attempt("4", accept) == {"job": "4", "twice": 8}
    assert contender.attempt("5", accept) == {"job": "5", "twice": 10}
    assert contender.failure is None


def test_a_contender_that_is_interrupted_ends_without_a_word(started, capfd):
    contender = started(DOUBLES)
    contender.attempt("4", accept)
    contender.process.send_signal(signal.SIGINT)
    assert contender.process.wait() == -signal.SIGINT
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "job", "check", "reason"),
    [
        (DOUBLES, "x", accept, "NAME: ValueError: invalid literal"),
        ("input(); sys.exit(4)", "4", accept, "NAME died with status 4"),
        ("sys.exit(3)", "4", accept, "NAME died with status 3|Broken pipe"),
        (DOUBLES, "4", refuse, "wrong bytes"),
    ],
    ids=["cannot do its job", "dies of its job", "has died before", "brings what is wrong"],
)
def test_a_peer_that_fails_is_out_and_ours_ends_it_all(started, code, job, check, reason):
    peer = started(code)
    assert peer.attempt(job, check) is None
    assert peer.attempt("4", accept) is None
    with pytest.raises((RuntimeError, OSError), match=reason):
        started(code, ours=True).attempt(job, check)
    assert peer.failure


@pytest.mark.parametrize("ours", [False, True])
def test_a_page_cache_that_is_not_as_wanted_is_no_failure_of_a_contender(started, ours):
    contender = started(
        """
import contenders, page_cache
def answer(job):
    if job == "cold":
        raise page_cache.PageCacheError("half of it stayed")
    return {"job": job}
contenders.serve(answer)
""",
        ours,
    )
    with pytest.raises(PageCacheError, match="half of it stayed"):
        contender.attempt("cold", accept)
    assert contender.attempt("4", accept) == {"job": "4"}


def test_what_a_contender_prints_besides_is_no_answer(started):
    prints = "contenders.serve(lambda job: os.system('echo from C') or print('from Python') or {'job': job})"
    contender = started(f"import contenders, os\n{prints}")
    assert contender.attempt("4", accept) == {"job": "4"}
    assert contender.attempt("5", accept) == {"job": "5"}


def test_a_contender_that_does_not_answer_is_killed(started):
    contender = started("import time; time.sleep(600)")
    contender.limit_s = 0.1
    assert contender.attempt("4", accept) is None
    assert contender.failure == "NAME did not answer within 0.1 s"
    assert contender.process.wait() == -9


def test_every_round_begins_with_another_one_and_the_first_does_not_count():
    turns = list(contenders.in_turns("abc", 2))
    assert "".join(item for item, _ in turns) == "abcbcacab"
    assert [counts for _, counts in turns] == [False] * 3 + [True] * 6


def test_results_are_printed_and_written_where_asked(tmp_path, capsys):
    contenders.publish({"a": 1}, "| a |\n", None)
    assert list(tmp_path.iterdir()) == []
    contenders.publish({"a": 1}, "| a |\n", tmp_path / "out")
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": 1}
    assert (tmp_path / "out.md").read_text() == "| a |\n"
    assert capsys.readouterr().out == "| a |\n" * 2


def test_decoder_tensors_are_the_same_every_time_and_differ_from_each_other():
    tensors = contenders.decoder_tensors(0.15)
    assert (0.15 * (1 << 30)) <= sum(tensor.nbytes for tensor in tensors.values()) < 0.3 * (1 << 30)
    assert contenders.checksum(tensors) == contenders.checksum(contenders.decoder_tensors(0.15))
    sums = {contenders.checksum({"": tensor}) for tensor in tensors.values()}
    assert len(sums) == len(tensors)


def test_small_tensors_are_small_and_many():
    tensors = contenders.small_tensors(0.01)
    assert len(tensors) > 50
    assert max(tensor.nbytes for tensor in tensors.values()) <= 512 << 10
    assert len({contenders.checksum({"": tensor}) for tensor in tensors.values()}) == len(tensors)


def test_the_checksum_is_taken_of_batches(monkeypatch):
    tensors = {name: torch.full((5,), ord(name), dtype=torch.uint8) for name in "cab"}
    assert list(contenders._batches(tensors, 10)) == [["a", "b"], ["c"]]
    assert list(contenders._batches(tensors, 4)) == [["a"], ["b"], ["c"]]
    assert list(contenders._batches({}, 4)) == []


def test_the_checksum_knows_names_places_and_bytes():
    tensors = {"a": torch.arange(8, dtype=torch.float32), "b": torch.arange(3, dtype=torch.uint8)}
    changed = {
        "byte": {**tensors, "b": torch.tensor([0, 1, 3], dtype=torch.uint8)},
        "order": {**tensors, "a": tensors["a"].flip(0)},
        "names": {"a": tensors["a"], "c": tensors["b"]},
    }
    sums = {contenders.checksum(t) for t in (tensors, *changed.values())}
    assert len(sums) == 4
    assert contenders.checksum({name: tensor.clone() for name, tensor in tensors.items()}) in sums


def test_a_small_model_has_hardly_more_bytes_than_asked_for():
    size_bytes = sum(tensor.nbytes for tensor in contenders.decoder_tensors(0.085).values())
    assert 0.085 * (1 << 30) <= size_bytes < 0.088 * (1 << 30)


def test_a_module_has_the_tensors_themselves_under_their_names():
    tensors = {
        "a": torch.zeros(1),
        "layers.0.q": torch.zeros(2),
        "layers.0.k": torch.zeros(3),
        "layers.1.q": torch.zeros(1),
    }
    parameters = dict(contenders.module_of(tensors).named_parameters())
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == {
        name: tensor.data_ptr() for name, tensor in tensors.items()
    }
