"""The command line. Commands import torch, and modules that need it, only if they need them: that takes seconds."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ._checkpoint import Checkpoint, open_checkpoint
from ._listing import by_name, lines_of, summary_of
from ._logging import PrintableFormatter, cut, logger, printable, printable_lines
from ._native import FlashPackError
from .constants import WEIGHTS_NAME
from .version import __version__


class _FlashPackFile(click.Path):
    """A flashpack file, given by its path or by the directory of a model that has one."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        path = os.fsdecode(super().convert(value, parameter, context))
        if not os.path.isdir(path):
            return path
        file = os.path.join(path, WEIGHTS_NAME)
        return file if os.path.isfile(file) else path


# A line for a terminal shows as many characters. A name or a text in a file may have millions.
_MAX_SHOWN = 1000
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_PATH = _FlashPackFile(exists=True)
_VERBOSE = click.option("--verbose", "-v", is_flag=True, help="Tell what is done and, if it fails, where.")
_FORCE = click.option("--force", is_flag=True, help="Replace the default destination, and other files in a directory.")


@click.group(
    name="flashpack",
    epilog="Exit status: 0 done, 1 not done, corrupt or different, 2 wrong usage, 128 and more ended by a signal.",
)
@click.version_option(__version__, prog_name="flashpack")
def main() -> None:
    """Checkpoints in the flashpack format, which load at the speed of the hardware.

    \b
    flashpack convert model.safetensors      # writes model.flashpack
    flashpack ls model.flashpack             # what is in it
    flashpack revert model.flashpack         # and back

    Long commands show their progress on a terminal. In pipes, and with --json, they print nothing but the result.
    """
    if sys.stderr is None:  # A shell can start a program with it closed.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  It is for the rest of the process.
    if not sys.stderr.isatty():
        # Without a handler, Python itself would print the warnings of the package.
        logger.addHandler(logging.NullHandler())
    elif logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter())


@main.command()
@click.argument("path", type=_PATH)
@click.option("--show-index", "--index", "-i", is_flag=True, help="List every tensor, too.")
@click.option("--json", "-j", "as_json", is_flag=True, help="Print JSON, for programs.")
def metadata(path: str, show_index: bool, as_json: bool) -> None:
    """Show what is in a checkpoint.

    PATH is a flashpack or safetensors file, the index of several, or a directory. Reads no tensors, so this is quick
    for any size, and checks every rule of the format.

    \b
    flashpack metadata model.flashpack
    flashpack metadata model.flashpack --index | grep lm_head
    flashpack metadata model.flashpack --index --json | jq '.index[].name'
    """
    with _reporting(verbose=False), open_checkpoint(path) as checkpoint:
        shown = _summary(checkpoint, {} if as_json else {"size": summary_of(checkpoint.entries())})
        if not show_index:
            del shown["index"]
        click.echo(json.dumps(shown, indent=2) if as_json else "\n".join(_describe(shown)))


@main.command()
@click.argument("path", type=_PATH)
@click.option("--json", "-j", "as_json", is_flag=True, help="Print JSON, for programs.")
def ls(path: str, as_json: bool) -> None:
    """List the tensors of a checkpoint, sorted by name: name, dtype, shape and size.

    PATH is a flashpack or safetensors file, the index of several, or a directory. Reads no tensors.

    \b
    flashpack ls model.safetensors
    flashpack ls llama/ | grep lm_head
    """
    with _reporting(verbose=False), open_checkpoint(path) as checkpoint:
        entries = by_name(checkpoint.entries())
        if as_json:
            names = ("name", "dtype", "shape", "size_bytes")
            click.echo(json.dumps([{name: getattr(entry, name) for name in names} for entry in entries]))
        else:
            for line in itertools.chain(lines_of(entries), [summary_of(entries)]):
                click.echo(line)


@main.command()
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
def diff(first: str, second: str) -> None:
    """Compare the tensors of two checkpoints, of any format.

    FIRST and SECOND are flashpack or safetensors files, indices of several, or directories. A line begins with - for a
    tensor that only FIRST has, + for one that only SECOND has, ~ for another dtype or shape, ! for other values, which
    are compared bit by bit. Exit status 1 says that there is a difference.

    \b
    flashpack diff model.safetensors model.flashpack && echo the same
    """
    with _reporting(verbose=False):
        from ._diff import differences

        with open_checkpoint(first) as ours, open_checkpoint(second) as theirs:
            count = 0
            for difference in differences(ours, theirs):
                click.echo(difference)
                count += 1
            same = f"the same: {summary_of(ours.entries())}"
            click.echo(f"{count} {'difference' if count == 1 else 'differences'}" if count else same)
        if count:
            sys.exit(1)


@main.command()
@click.argument("path_or_repo_id", metavar="SOURCE")
@click.argument("destination_path", metavar="[DESTINATION]", type=click.Path(), required=False)
@click.option("--subfolder", help="The folder in a directory or repository that has the model.")
@click.option("--variant", help="Choose one of several sets of weights: fp16 for model.fp16.safetensors.")
@click.option("--dtype", help="Cast floating-point tensors to this: bfloat16, ...; others keep theirs.")
@click.option("--ignore-names", multiple=True, metavar="NAME", help="Leave out this tensor.  [repeatable]")
@click.option("--ignore-prefixes", multiple=True, metavar="PREFIX", help="Leave out what begins so.  [repeatable]")
@click.option("--ignore-suffixes", multiple=True, metavar="SUFFIX", help="Leave out what ends so.  [repeatable]")
@click.option("--key", help="Of a file of torch.save, take what it has below this name: state_dict of Lightning.")
@click.option("--strip-compiled", is_flag=True, help='Leave out the "_orig_mod." that torch.compile puts into names.')
@click.option("--use-transformers", is_flag=True, help="Build the model with transformers, for its module names.")
@click.option("--use-diffusers", is_flag=True, help="Build the model with diffusers, for its module names.")
@click.option("--copy-code", is_flag=True, help="Copy Python files that come with a model, too. None of them is run.")
@_FORCE
@_VERBOSE
def convert(
    path_or_repo_id: str,
    destination_path: str | None,
    subfolder: str | None,
    variant: str | None,
    force: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Convert a checkpoint to the flashpack format.

    SOURCE is a file (safetensors, what torch.save wrote, or the index.json of a sharded checkpoint), a directory of
    transformers or diffusers, or a repository on the Hugging Face Hub.

    A file becomes a file: by default, SOURCE with the suffix .flashpack. A directory becomes a directory:
    DESTINATION/model.flashpack with the configuration, tokenizer and generation files beside it, for a pipeline one
    model.flashpack in the folder of each component, and adapter_model.flashpack for an adapter; modules of
    sentence-transformers after the model itself keep their weights as they are; code stays behind unless --copy-code
    asks for it, and so do other folders, which a warning names. By default DESTINATION is the directory itself; a
    repository has no default. If DESTINATION is called *.flashpack, it becomes a file with the weights alone. SOURCE is
    never changed. A DESTINATION that is named is replaced; but in a directory, files beside the weights that differ are
    an error without --force.

    Tensors keep the names they have in the checkpoint, and no model is built. --use-transformers and --use-diffusers
    build it and take the names of its modules, which load_state_dict() of that model wants.

    \b
    flashpack convert model.safetensors
    flashpack convert pytorch_model.bin out.flashpack --dtype bfloat16
    flashpack convert last.ckpt --key state_dict
    flashpack convert ./llama ./llama-flashpack
    flashpack convert ./llama ./llama.flashpack
    flashpack convert stabilityai/sdxl-turbo ./sdxl --variant fp16
    flashpack convert ./bert ./bert-flashpack --use-transformers
    """
    with _reporting(verbose):
        _quieten_libraries()
        from .commands import convert_to_flashpack

        options |= {"subfolder": subfolder, "variant": variant, "force": force}
        saved = convert_to_flashpack(path_or_repo_id, destination_path, silent=False, **options)
        _succeed(saved)


@main.command()
@click.argument("path", type=click.Path(exists=True))
@click.argument("destination_path", metavar="[DESTINATION]", type=click.Path(), required=False)
@_FORCE
@_VERBOSE
def revert(path: str, destination_path: str | None, force: bool, verbose: bool) -> None:
    """Convert a flashpack file, or a directory with one, back.

    A file becomes a file: with the suffix .safetensors, DESTINATION becomes a safetensors file, with any other a file
    for torch.load(). By default it is PATH with the suffix .safetensors.

    A directory becomes a directory with a safetensors file of the name that its library looks for, for a pipeline in
    the folder of each component, and the configuration, tokenizer and generation files. By default DESTINATION is the
    directory itself. If it is called *.safetensors, *.bin, *.pt, *.pth or *.ckpt, it becomes a file.

    Older weights that programs would load in place of the result, which are an index or a flashpack file, are an error,
    unless DESTINATION is a file that is named. --force removes them from a directory, once the result is durable, but
    not the files that an index lists.

    \b
    flashpack revert model.flashpack
    flashpack revert model.flashpack pytorch_model.bin
    flashpack revert ./llama-flashpack ./llama
    """
    with _reporting(verbose):
        from ._reversal import revert

        _succeed(revert(path, destination_path, silent=False, force=force))


@main.command()
@click.argument("path", type=_PATH)
@click.option("--json", "-j", "as_json", is_flag=True, help="Print JSON, for programs.")
@_VERBOSE
def verify(path: str, as_json: bool, verbose: bool) -> None:
    """Check a checkpoint against its checksums, or its name in the cache of the Hugging Face Hub.

    PATH is the file, or the directory of a model. Reads all of it, and names the tensors that are not as they were
    written. A safetensors file in the cache is named for a hash of its content, and held against that. Another file
    without checksums is an error.

    \b
    flashpack verify model.flashpack && echo fine
    """
    with _reporting(verbose):
        from .deserialization import verify_file

        report = verify_file(path, silent=as_json)
        if as_json:
            keys = ("offset_bytes", "size_bytes", "tensors")
            corrupt = [dict(zip(keys, stripe, strict=True)) for stripe in report["corrupt"]]
            click.echo(json.dumps({**report, "corrupt": corrupt}))
        else:
            for offset_bytes, size_bytes, names in report["corrupt"]:
                click.echo(f"corrupt: bytes {offset_bytes}+{size_bytes}, of {printable(names)}")
            sound = f"sound: {report['verified_bytes']} bytes in {report['seconds']:.2f} s"
            count = len(report["corrupt"])
            click.echo(f"{count} {'stripe' if count == 1 else 'stripes'} corrupt, {sound}" if count else sound)
        if report["corrupt"]:
            sys.exit(1)


@main.command(
    epilog="Exit status: 0 it was measured, and kept unless --dry_run; 1 it failed; 2 wrong usage; 3 it was measured, "
    "but no profile could be kept, which is said before: where no disk or server can be recognised another time, as on "
    "tmpfs, the overlay that a container has as its root, ZFS and most of FUSE, or without a place to write."
)
@click.argument("path", type=click.Path(), default=".")
@click.option("--device", default="cpu", show_default=True, help="Where loads go: cpu, cuda or cuda:1.")
@click.option(
    "--budget",
    metavar="TIME",
    default="60s",
    show_default=True,
    help="Time to measure, as 60, 60s or 1min; writing and proving a gain add to it.",
)
@click.option("--picture", type=click.Path(), metavar="FILE", help="Draw a map as .svg or .png, with matplotlib.")
@click.option("--verify", is_flag=True, help="Loads compare checksums, as load_file() does by default.")
@click.option("--writes", is_flag=True, help="Measure durable writes, too. They are only shown.")
@click.option("--backend", is_flag=True, help="Search reads by the workers beside those by io_uring, too.")
@click.option("--policy", is_flag=True, help="Compare loads past and through the page cache, too. They are only shown.")
@click.option("--size_gib", type=float, default=1, show_default=True, help="Size of the file that is read.")
@click.option("--dry_run", is_flag=True, help="Keep no profile.")
@click.option("--json", "-j", is_flag=True, help="Print JSON, for programs.")
def tune(path: str, picture: str | None, **options: Any) -> None:
    """Find the best settings for a disk, and keep them for the loads to come.

    PATH is a directory on the disk, or a file in it; by default, it is the working directory. A file, which is removed
    in the end, is made there and read with chunks, queue depths and workers of various sizes. If something is faster
    than the defaults, it is kept in $XDG_CONFIG_HOME/flashpack/tune.json, else ~/.config/flashpack/tune.json, and loads
    from that disk to host memory use it from then on. FLASHPACK_TUNE=off turns that off.

    With a GPU as --device, the file is read to its memory, with various staging memory, too, and loads to GPUs use what
    is kept for as long as the machine has the same models of GPU.

    A backend that was faster is kept, too. A cache policy is not, because each load has its own.

    It runs the program flashpack_tune, which is installed with the C++ library, too, for machines without Python.

    \b
    flashpack tune /models
    flashpack tune /models --device cuda
    flashpack tune /models --budget 20s --dry_run
    flashpack tune /models --picture models.svg
    flashpack tune /models --json | jq .best
    """
    with _reporting(verbose=False):
        from ._tune import tune

        flags = [f"--{name}" for name in ("verify", "writes", "backend", "policy", "dry_run", "json") if options[name]]
        values = [f"--{name}={options[name]}" for name in ("device", "budget", "size_gib")]
        status = tune([*values, *flags], path, picture)
    sys.exit(status)


@main.command(epilog="Exit status: 0 it was tried (limits or not), 1 there is nothing at PATH, 2 wrong usage.")
@click.argument("path", type=click.Path(), required=False)
@click.option("--json", is_flag=True, help="Print JSON, for programs.")
def probe(path: str | None, json: bool) -> None:
    """Show what this machine allows, and how to remove its limits.

    It tries io_uring, registered buffers and huge pages, and for a PATH, which is a checkpoint or the directory where
    checkpoints are, direct reads, how to ask the page cache, and which profile of `flashpack tune` loads have, or why
    they have none.

    \b
    flashpack probe
    flashpack probe /models/model.flashpack
    flashpack probe /models --json | jq .profile.value
    """
    with _reporting(verbose=False):
        from ._programs import run

        status = run("flashpack_probe", [*(["--json"] if json else []), *(["--", path] if path else [])])
    sys.exit(status)


def _summary(checkpoint: Checkpoint, more: dict[str, str]) -> dict[str, Any]:
    """Returns the keys of the footer and `more`, with one word for the checksums, because they are too many to show.

    What is no flashpack file gets keys of its own.
    """
    files = checkpoint.files()
    checksums = {"checksums": "crc32c" if all(file.has_checksums for file in files) else "none", **more}
    if [file.format for file in files] != ["flashpack"]:
        return _summary_of_files(checkpoint, checksums)
    summary = dict(checkpoint.metadata)
    lists: dict[str, Any] = {key: summary.pop(key) for key in ("metadata", "macroblocks", "index") if key in summary}
    return {**summary, **checksums, **lists}


def _summary_of_files(checkpoint: Checkpoint, checksums: dict[str, str]) -> dict[str, Any]:
    files, entries, metadata = checkpoint.files(), checkpoint.entries(), checkpoint.native.user_metadata
    names = [file.path.name for file in files]
    return {
        "format": " and ".join(sorted({file.format for file in files})),
        "files": names,
        "tensors": len(entries),
        "total_tensor_bytes": sum(entry.size_bytes for entry in entries),
        **checksums,
        **({"metadata": metadata} if metadata else {}),
        "index": [{**entry._asdict(), "file": names[entry.file]} for entry in entries],
    }


def _describe(summary: dict[str, Any]) -> Iterator[str]:
    digits = len(str(summary.get("total_payload_bytes") or summary.get("total_elems")))
    for key, value in summary.items():
        if key == "metadata":
            yield f"{click.style(key, fg='green')}:"
            yield from (f"  {click.style(printable(name), fg='blue')}: {_shown(text)}" for name, text in value.items())
        elif key == "macroblocks":
            yield f"{click.style(key, fg='green')}:"
            for i, block in enumerate(value):
                begin, end = block["offset_bytes"], block["offset_bytes"] + block["length_bytes"]
                yield f"  {click.style(f'{i}', fg='magenta')}: {block['dtype']:<10} {begin:0{digits}d}:{end:0{digits}d}"
        elif key == "index":
            yield f"{click.style(key, fg='green')}:"
            listed = _tensors_of_files if "files" in summary else _list
            yield from listed(value, summary.get("macroblocks", []), digits)
        else:
            yield f"{click.style(key, fg='green')}: {printable(str(value))}"


def _tensors_of_files(index: list[dict[str, Any]], *_: Any) -> Iterator[str]:
    for record in index:
        name, shape = click.style(printable(record["name"]), fg="blue"), list(record["shape"])
        yield f"  {name} {record['dtype']} {shape} {record['size_bytes']} bytes in {printable(record['file'])}"


def _list(index: list[dict[str, Any]], blocks: list[dict[str, Any]], digits: int) -> Iterator[str]:
    """Yields a line for each tensor, in file order, and before those of each macroblock a line for it."""
    index = sorted(index, key=lambda record: (record.get("macroblock", 0), record["offset"]))
    last = None
    for i, record in enumerate(index):
        elements = f"{record['offset']:0{digits}d}:{record['offset'] + record['length']:0{digits}d}"
        which = record.get("macroblock", 0)
        if blocks and which != last:
            yield f"  {click.style(f'macroblock{which}', fg='cyan')}: {blocks[which]['dtype']:<10} {elements}"
        last = which
        number = click.style(f"{i:0{len(str(len(index)))}d}", fg="magenta")
        yield f"  {number}: {elements} {click.style(printable(record['name']), fg='blue')} {record['shape']}"


def _shown(text: str) -> str:
    """Returns `text` for a line. A long text is cut, and only --json has all of it."""
    return printable(cut(text, _MAX_SHOWN))


def _succeed(path: str) -> None:
    click.secho(f"Success: Saved to {printable(os.fspath(Path(path).absolute()))}", fg="green")


@contextmanager
def _reporting(verbose: bool) -> Iterator[None]:
    """Turns an error into a line, and exit status 1. A traceback helps only with errors that nobody has foreseen."""
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        with _ended_by_signals():
            yield
    except BrokenPipeError:
        raise  # The reader has closed the pipe, so that click ends without a message.
    except Exception as error:
        if verbose and not isinstance(error, (FlashPackError, OSError)):
            click.echo(printable_lines(traceback.format_exc()), err=True)
        click.secho(f"Error: {printable_lines(str(error)) or type(error).__name__}", fg="red", err=True)
        sys.exit(1)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within it, a signal that would end the process at once raises SystemExit, so that temporary files are removed."""
    removing_until = 0.0

    def end(number: int, frame: object) -> None:
        # A second signal comes at once from a terminal that is closed. It must not end the removal. A later one shows
        # that SystemExit was lost, as it is in a destructor.
        nonlocal removing_until
        if time.monotonic() >= removing_until:
            removing_until = time.monotonic() + 5
            sys.exit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    # nohup ignores SIGHUP, and that stays so.
    handled = [each for each in _ENDING if is_main and signal.getsignal(each) is signal.SIG_DFL]
    for each in handled:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)


def _quieten_libraries() -> None:
    """Keeps progress of transformers, diffusers and the Hub out of standard error if that is no terminal."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
