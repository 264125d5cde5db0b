"""Damaged and hostile files for every reader: what each makes of them, in a process of its own.

``python tests/fuzzing.py TARGET START STOP`` reads the inputs of these numbers, which are the same
each time, in a process that may take little memory and time, and may do nothing but read. One line
of JSON tells what came of it. `run` does that for several targets and collects the failures.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
SECONDS, MEGABYTES = 30, 512
"""What one input may take."""

Dice = random.Random
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 10**30, 2**31, 2**53, 2**63, 65536),
    *("", "x", "x" * 5000, "\ud800", "../../etc/passwd", "/dev/zero", "text", "\0"),
    *([], {}, [[]], [0], [1, 2], [1, 2, 3], ["a"], {"a": 1}, float("nan"), float("inf")),
]
WORDS = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, -1]


# ------------------------------------------------------------------------------- mutations


def of_bytes(raw: bytes, dice: Dice, others: list[bytes]) -> bytes:
    """One to four changes that know nothing of the format."""
    changed = bytearray(raw)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        n = len(changed)
        # Headers and footers say more than what is between them.
        at = dice.choice([dice.randrange(n + 1), dice.randrange(min(n, 64) + 1)])
        at = dice.choice([at, at, n - dice.randrange(min(n, 400) + 1)])
        length = dice.choice([1, 2, 4, 8, dice.randrange(1, 200)])
        match dice.randrange(8):
            case 0 | 1 if n:
                changed[min(at, n - 1)] ^= 1 << dice.randrange(8)
            case 2 if n:
                changed[min(at, n - 1)] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
            case 3:
                width, order = dice.choice([2, 4, 8]), dice.choice(["little", "big"])
                word = (dice.choice(WORDS) % 256**width).to_bytes(width, order)
                changed[at : at + width] = word
            case 4:
                del changed[at : dice.choice([at + length, n])]
            case 5:
                changed[at:at] = changed[at : at + length] * dice.choice([1, 2, 50])
            case 6:
                other = dice.choice(others)
                start = dice.randrange(len(other) + 1)
                changed[at : at + length] = other[start : start + length]
            case _:
                changed[at:at] = dice.randbytes(length)
    return bytes(changed)


def of_json(value: Any, dice: Dice) -> Any:
    """JSON with one place replaced, left out or repeated."""
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        node = level.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        level += [node[key] for key in keys if isinstance(node[key], dict | list)]
    if not places or dice.random() < 0.03:
        return dice.choice(ODD)
    node, key = dice.choice(places)
    match dice.randrange(5):
        case 0:
            del node[key]
        case 1:
            other, name = dice.choice(places)
            with_it = other[name] if name in other or isinstance(other, list) else None
            node[key] = json.loads(json.dumps(with_it))
        case 2 if isinstance(node[key], int | float):
            node[key] += dice.choice([-1, 1, 0.5, 1000, -(2**31)])
        case 3 if dice.random() < 0.2:
            deep: Any = 0
            for _ in range(dice.choice([70, 900])):
                deep = [deep]
            node[key] = deep
        case _:
            node[key] = dice.choice(ODD)
    return value


def of_json_text(raw: bytes, dice: Dice) -> bytes:
    text = json.dumps(of_json(json.loads(raw), dice), indent=2) + "\n"
    if dice.random() < 0.05:
        text = text.replace(": 0", ": " + dice.choice(["1e999", "-", "9" * 5000, "[" * 10**5]), 1)
    return text.encode("utf-8", "surrogatepass")


def of_lines(raw: bytes, dice: Dice) -> bytes:
    lines = raw.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    lines[at] = json.dumps(of_json(json.loads(lines[at]), dice)).encode() + b"\n"
    return b"".join(lines)


def of_safetensors(raw: bytes, dice: Dice) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    header = of_json(json.loads(raw[8 : 8 + length]), dice)
    if isinstance(header, dict) and dice.random() < 0.3:
        for entry in header.values():
            if isinstance(entry, dict) and dice.random() < 0.3:
                kind = ["F8_E4M3", "F8_E5M2", "BF16", "F16", "F64", "BOOL", "U8", "C64", "F4"]
                entry["dtype"] = dice.choice(kind)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def of_parquet(raw: bytes, dice: Dice) -> bytes:
    """The table with a column that is another, written in one of many ways."""
    table = pq.read_table(io.BytesIO(raw))
    at = dice.randrange(table.num_columns)
    name, n = table.column_names[at], table.num_rows
    values = table.column(at).to_pylist()
    odd = [0, -1, 1, 2**31 - 1, -(2**31), 2**63 - 1, None, float("nan"), float("inf"), "", "x", 7]
    columns: list[Any] = [
        pa.array([[1]] * n),
        pa.array([{"a": 1}] * n),
        pa.array(["x" * 10**5] * n),
        pa.array([str(value) for value in values]),
        pa.array([str(value) for value in values]).dictionary_encode(),
        pa.array([None] * n),
        pa.array([0.5] * n),
        pa.array([b"x"] * n),
    ]
    match dice.randrange(7):
        case 0:
            table = table.drop_columns([name])
        case 1:
            table = table.append_column(name, table.column(at))
        case 2:
            table = table.slice(0, dice.randrange(n + 1))
        case 3:
            table = pa.concat_tables([table] * dice.choice([2, 300]))
        case 4:
            table = table.append_column("more", dice.choice(columns))
        case 5:
            table = table.set_column(at, name, dice.choice(columns))
        case _:
            values[dice.randrange(n)] = dice.choice(odd)
            try:
                table = table.set_column(at, name, pa.array(values, table.column(at).type))
            except (pa.ArrowException, OverflowError):
                table = table.take(pa.array(dice.sample(range(n), n)))
    options: dict[str, Any] = {
        "compression": dice.choice(["zstd", "none", "snappy", "gzip"]),
        "data_page_version": dice.choice(["1.0", "2.0"]),
        "row_group_size": dice.choice([1, 3, 10**6]),
        "store_schema": dice.random() < 0.5,
        "use_dictionary": dice.random() < 0.5,
    }
    if not options["use_dictionary"] and table.column_names.count(name) == 1:
        kind = table.schema.field(name).type
        text = pa.types.is_string(kind) or pa.types.is_binary(kind)
        if text or pa.types.is_integer(kind):
            encoding = "DELTA_BYTE_ARRAY" if text else "DELTA_BINARY_PACKED"
            options["column_encoding"] = {name: encoding}
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


def of_zip(raw: bytes, dice: Dice) -> bytes:
    """The archive with one member that is another."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = dice.choice(list(members))
    match dice.randrange(4):
        case 0:
            del members[name]
        case 1:
            members[name] = dice.choice(list(members.values()))
        case 2 if name.endswith(".npy"):
            members[name] = of_npy(members[name], dice)
        case _:
            members[name] = of_bytes(members[name], dice, list(members.values()))
    stream = io.BytesIO()
    method = dice.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return stream.getvalue()


def of_npy(raw: bytes, dice: Dice) -> bytes:
    """The array with another header."""
    length = int.from_bytes(raw[8:10], "little")
    kind = ["<f4", "|O", "<U9", "<c8", ">i8", "|b1", "<f2", "<M8[s]", "|V3", "[('a', '<i4')]"]
    shape = ["()", "(3,)", "(0, 4)", "(2**40,)", "(-1, 4)", "(4, 4, 4, 4)", "(1099511627776, 9)"]
    header = dice.choice(
        [
            f"{{'descr': {dice.choice(kind)!r}, 'fortran_order': False, 'shape': (5, 4, 4)}}",
            f"{{'descr': '|u1', 'fortran_order': True, 'shape': {dice.choice(shape)}}}",
            "{'descr': '|u1', 'shape': (3,)}",
            "(" * dice.choice([50, 9000]),
            "__import__('os').system('true')",
        ]
    ).encode()
    return raw[:8] + len(header).to_bytes(2, "little") + header + raw[10 + length :]


def mutated(name: str, raw: bytes, dice: Dice, others: list[bytes]) -> bytes:
    """A file that is damaged, or hostile, by the rules of its format or by none."""
    by_format: dict[str, Callable[[bytes, Dice], bytes]] = {
        ".json": of_json_text,
        ".jsonl": of_lines,
        ".safetensors": of_safetensors,
        ".parquet": of_parquet,
        ".npz": of_zip,
        ".pt": of_zip,
        ".npy": of_npy,
    }
    if name.endswith(".gz") and dice.random() < 0.6:
        inner = [gzip.decompress(raw)]
        return gzip.compress(mutated(name[:-3], inner[0], dice, inner), dice.choice([0, 1]))
    change = by_format.get(Path(name).suffix)
    if change is not None and dice.random() < 0.6:
        with suppress(Exception):  # what cannot even be written
            return change(raw, dice)
    return of_bytes(raw, dice, others)


# --------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """What is read.

    Attributes
    ----------
    make : callable
        Writes valid files into a folder.
    read : callable
        Reads what is in the folder, as a user would.
    share : int
        How many of a hundred thousand inputs it gets.
    also : callable, optional
        Called with the folder, the name of the damaged file and dice before it is read.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    share: int
    also: Callable[[Path, str, Dice], object] = field(default=lambda folder, name, dice: None)


def make_images_run(folder: Path) -> None:
    sys.path.append(str(HERE / "store"))
    from run_builder import contents, write

    made = contents()
    made.tables["features"]["label"] = "a label"
    made.metadata["data"]["class_names"] = [str(n) for n in range(10)]
    write(folder, made)


def make_texts_run(folder: Path) -> None:
    shutil.copytree(HERE / "golden" / "run-v1-texts", folder, dirs_exist_ok=True)


def forge(folder: Path, name: str, dice: Dice) -> None:
    """Make run.json agree with the size of a file; a digest is looked at by nobody here."""
    if name != "run.json" and dice.random() < 0.95:
        content = json.loads((folder / "run.json").read_bytes())
        content["files"][name]["bytes"] = (folder / name).stat().st_size
        (folder / "run.json").write_text(json.dumps(content, indent=2) + "\n")


def read_run(folder: Path) -> None:
    """The explorer's way, which does without what is damaged, and then the strict one."""
    import polyseme as ps
    from polyseme.explorer.open_runs import open_all
    from polyseme.store import altered_files

    altered_files(folder)
    (files,) = open_all([folder])
    for path in files.paths():
        if path not in ("verified.json", "packs/1.safetensors"):
            files.file(path)
    run = ps.open_run(folder)
    run.folder.load_all()
    run._repr_html_()
    for site in run.folder.sites:
        neuron = run.neuron(site.name, 0)
        neuron._repr_html_()
        neuron.recut(0.1).metrics  # noqa: B018
        neuron.tokens()
        if "tokens" in run.folder.inputs:
            neuron.texts(before=5)
        else:
            neuron.panel()
        if len(neuron.examples):
            neuron.similar(2)


def make_idx(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    images = bytes([0, 0, 8, 3]) + np.array(pixels.shape, ">u4").tobytes() + pixels.tobytes()
    labels = bytes([0, 0, 8, 1]) + np.array([5], ">u4").tobytes() + bytes(range(5))
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def make_arrays(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    np.save(folder / "a.npy", pixels)
    np.savez(folder / "b.npz", images=pixels, labels=np.arange(5))
    np.savez_compressed(folder / "c.npz", x_train=pixels / 255, y_train=np.arange(5)[:, None])


def read_each_array(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        read_images_of(path)


def read_images_of(path: Path) -> None:
    from polyseme.data.sources import as_source

    source = as_source(path)
    for batch, _ in source.batches(3):
        source.to_input(batch)
    source.identity()


def make_pictures(folder: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg", "c.gif", "d.bmp", "e.webp"):
        Image.fromarray(pixels).save(folder / name)


TEXTS = ["The river bank.\nA second line, naïve 🦜.", "", "Money in the bank. " * 20]


def make_texts(folder: Path) -> None:
    lines = "".join(json.dumps({"text": text, "n": [1, {"a": 2}]}) + "\n" for text in TEXTS)
    (folder / "a.txt").write_text("\n".join(TEXTS))
    (folder / "b.txt.gz").write_bytes(gzip.compress("\r\n".join(TEXTS).encode()))
    (folder / "c.jsonl").write_text(lines)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pd.DataFrame({"n": range(3), "text": TEXTS}).to_parquet(folder / "e.parquet")


def read_texts(folder: Path) -> None:
    from polyseme.data import read_text

    texts = read_text(folder)
    for _ in texts.parts():
        pass
    texts.identity()


SHAPES = {"W_enc": (4, 6), "W_dec": (6, 4), "b_enc": (6,), "b_dec": (4,)}


def sae_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def make_saes(folder: Path) -> None:
    import torch

    arrays = sae_arrays()
    save_file(arrays, folder / "a.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / "b.pt")
    np.savez(folder / "c.npz", **arrays)


def make_sae_folders(folder: Path) -> None:
    import torch

    arrays = sae_arrays()
    renamed = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    turned = {
        renamed.get(name, name): np.ascontiguousarray(array.T) for name, array in arrays.items()
    }
    saelens = {
        "architecture": "standard",
        "d_in": 4,
        "d_sae": 6,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "x"},
    }
    dictionary = {"dict_class": "AutoEncoderTopK", "activation_dim": 4, "dict_size": 6, "k": 2}
    gemma = {
        "hf_hook_point_in": "a",
        "hf_hook_point_out": "a",
        "type": "sae",
        "architecture": "jump_relu",
    }
    configurations: dict[str, tuple[str, dict[str, Any]]] = {
        "saelens": ("cfg.json", saelens),
        "sparsify": ("cfg.json", {"k": 2, "d_in": 4, "expansion_factor": 1, "num_latents": 6}),
        "dictionary_learning": ("config.json", {"trainer": dictionary}),
        "gemma": ("config.json", gemma),
        "gemma_npz": ("", {}),
    }
    for name, (file, content) in configurations.items():
        (folder / name).mkdir()
        if file:
            (folder / name / file).write_text(json.dumps(content))
    save_file(arrays, folder / "saelens" / "sae_weights.safetensors")
    save_file(turned | {"W_dec": arrays["W_dec"]}, folder / "sparsify" / "sae.safetensors")
    decoder = {"decoder.weight": np.ascontiguousarray(arrays["W_dec"].T)}
    kept = {name: array for name, array in turned.items() if name != "W_dec"} | decoder
    torch.save(
        {name: torch.from_numpy(array) for name, array in kept.items()},
        folder / "dictionary_learning" / "ae.pt",
    )
    gemma_scope = arrays | {"threshold": np.zeros(6, np.float32)}
    small = {name.lower(): array for name, array in gemma_scope.items()}
    save_file(small, folder / "gemma" / "params.safetensors")
    np.savez(folder / "gemma_npz" / "params.npz", **gemma_scope)


def read_saes(folder: Path) -> None:
    from polyseme.errors import PolysemeError
    from polyseme.sae import load_sae

    refused = None
    for path in sorted(folder.iterdir()):
        try:
            # A state dict on its own does not tell its formula.
            alone = {"activation": "relu", "apply_b_dec_to_input": True}
            sae = load_sae(path, **({} if path.is_dir() else alone))
            next(iter(sae.parameters()))
        except PolysemeError as error:
            refused = error
    if refused is not None:
        raise refused


def read_one_by_one(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [read(path) for path in sorted(folder.iterdir())]


TARGETS = {
    "image run": Target(make_images_run, read_run, 15_000, forge),
    "text run": Target(make_texts_run, read_run, 10_000, forge),
    "idx": Target(make_idx, read_images_of, 20_000),
    "arrays": Target(make_arrays, read_each_array, 20_000),
    "pictures": Target(make_pictures, read_images_of, 10_000),
    "texts": Target(make_texts, read_texts, 19_000),
    "saes": Target(make_saes, read_saes, 4_000),
    "sae folders": Target(make_sae_folders, read_saes, 2_000),
}


# --------------------------------------------------------------------------------- workers


@contextmanager
def reading_alone(folder: Path) -> Iterator[None]:
    """Stop the process at anything but reading."""
    watching = True
    # Code of libraries is loaded when it is first needed, wherever that is.
    roots = tuple({*map(os.path.realpath, (sys.prefix, sys.base_prefix)), str(HERE.parent), "<fr"})
    never = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.")
    never += ("pickle.find_class", "urllib.Request", "webbrowser.open")
    changing = ("os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.chmod")
    changing += ("os.mkdir", "os.truncate", "shutil.")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        bad = event.startswith(never)
        if event == "exec":
            file = arguments[0].co_filename
            # Libraries make code of text as they are loaded; whoever runs it tells.
            file = sys._getframe(1).f_code.co_filename if file == "<string>" else file
            bad = not (file.startswith("<fr") or os.path.realpath(file).startswith(roots))
        elif event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            writes = bool(set(mode or "") & set("wax+")) or (flags or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            bad = bool(writes) and not os.path.realpath(path).startswith(str(folder))
        elif event.startswith(changing):
            bad = not os.path.realpath(str(arguments[0])).startswith(str(folder))
        if bad:
            trace = "".join(traceback.format_stack(limit=8))
            print(json.dumps({"failed": f"{event}{arguments!r}\n{trace}"}), flush=True)
            os._exit(3)

    sys.addaudithook(hook)
    try:
        yield
    finally:
        watching = False


def input_of(target: Target, number: int, files: dict[str, bytes], dice: Dice) -> tuple[str, bytes]:
    """The file that input of this number changes, and what it holds then."""
    name = dice.choice(list(files))
    return name, mutated(name, files[name], dice, list(files.values()))


def work(name: str, start: int, stop: int) -> None:
    """Read the inputs of a target, and print what came of them."""
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve() / "whole"
        folder.mkdir() if target.make is not make_images_run else None
        target.make(folder)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        target.read(folder)  # loads all that is needed, and shows that the files are valid
        folder = folder.rename(folder.with_name("damaged"))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used + 3 * MEGABYTES * 2**20  # address space, of which less may be used
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        with reading_alone(folder):
            read_all(name, target, folder, files, range(start, stop))


def peak_memory() -> int:
    """Most memory that this process has used, kB; unlike ``ru_maxrss``, none of its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def read_all(
    name: str, target: Target, folder: Path, files: dict[str, bytes], numbers: range
) -> None:
    from polyseme.errors import PolysemeError

    counts = {"read": 0, "refused": 0}
    for number in numbers:
        dice = Dice(f"{name} {number}")
        print(json.dumps({"at": number}), flush=True)
        changed, raw = input_of(target, number, files, dice)
        (folder / changed).write_bytes(raw)
        target.also(folder, changed, dice)
        peak = peak_memory()
        signal.alarm(SECONDS)
        try:
            target.read(folder)
            counts["read"] += 1
        except PolysemeError as error:
            counts["refused"] += 1
            said = " ".join(str(error).split())
            if not said or any(w in said for w in ("malloc", "llocat", "MemoryError")):
                print(json.dumps({"failed": f"{number} ({changed}): {said}"}), flush=True)
        except BaseException:
            trace = traceback.format_exc(limit=-8)
            print(json.dumps({"failed": f"{number} ({changed}): {trace}"}), flush=True)
        signal.alarm(0)
        grown = (peak_memory() - peak) // 1024
        if grown > MEGABYTES:
            print(json.dumps({"failed": f"{number} ({changed}): took {grown} MB"}), flush=True)
        for file in {changed, "run.json"} & files.keys():
            (folder / file).write_bytes(files[file])
    print(json.dumps(counts), flush=True)


def run(inputs: dict[str, range], say: Callable[[str], object] = print) -> list[str]:
    """Read inputs of several targets, two processes at a time; the failures."""
    with ThreadPoolExecutor(2) as pool:
        return [
            f for found in pool.map(_failures, inputs, inputs.values(), repeat(say)) for f in found
        ]


def _failures(name: str, numbers: range, say: Callable[[str], object]) -> list[str]:
    begun, at, failures = time.monotonic(), numbers.start, []
    counts = {"read": 0, "refused": 0}
    while at < numbers.stop:
        first = at
        command = [sys.executable, str(Path(__file__).resolve()), name, str(at), str(numbers.stop)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if "at" in told:
                    at = told["at"] + 1
                    if at % 1000 == 0:
                        say(f"{name}: {at:,} of {numbers.stop:,}, {time.monotonic() - begun:.0f} s")
                elif "failed" in told:
                    failures.append(f"{name} {told['failed']}")
                else:
                    counts = {key: counts[key] + told[key] for key in counts}
        if process.returncode not in (0, 3):  # 3 has told why
            failures.append(f"{name} {at - 1}: the process ended with {process.returncode}")
        if at == first:
            break
    say(f"{name}: {len(numbers):,} inputs, {counts}, {time.monotonic() - begun:.0f} s")
    return failures


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
