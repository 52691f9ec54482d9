"""What does loading a checkpoint cost? Time over reading the file, memory over the weights.

The same random float32 weights in three formats, written here: a Hugging Face folder, a fairseq
checkpoint in the layout of version 0.12, and one of our checkpoints. A load ends when every page of
the weights has been touched; reading copies the file into fresh memory. The page cache is warm.
Memory is the peak of a fresh process minus what it had after its imports, including mapped page
cache (Linux only).
"""

import argparse
import functools
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_models import CONFIGURATIONS, make_model
from benchmarks.workload import in_turns, machine, print_table
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import (
    load_fairseq,
    load_huggingface_model,
    load_pretrained,
    save_checkpoint,
)

LOADERS: dict[str, Callable[[Path], Transformer]] = {
    "Hugging Face": lambda path: load_huggingface_model(path.parent),
    "fairseq 0.12": lambda path: load_fairseq(path, text="segmented")[0],
    "ours": lambda path: load_pretrained(path).model,
}
HEADER = (
    *("format", "file", "reading", "loading", "over reading"),
    *("processor", "over reading", "peak memory", "over weights"),
)
PAGE = 1024  # float32 values in 4 KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    fsmt = [name for name, (family, _) in CONFIGURATIONS.items() if family == "FSMT"]
    parser.add_argument("--config", choices=fsmt, default="big")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each task")
    parser.add_argument("--measure", nargs=2, metavar=("FORMAT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:  # this is the fresh process
        print(peak_memory(options.measure[0], Path(options.measure[1])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), options.config)
        weights = 4 * sum(p.numel() for p in LOADERS["ours"](files["ours"]).parameters())
        print(f"{machine()}\n{options.config}: {weights / 1e6:.0f} MB of weights\n")
        for name, file in files.items():
            tasks = {"read": file.read_bytes, "load": functools.partial(load, name, file)}
            seconds = in_turns(options.repeats, warm=False, **tasks)
            (read_wall, read_cpu), (wall, cpu) = seconds["read"], seconds["load"]
            command = [sys.executable, "-m", "benchmarks.loading", "--measure", name, str(file)]
            peak = int(subprocess.run(command, check=True, capture_output=True).stdout)
            rows.append(
                (
                    *(name, f"{file.stat().st_size / 1e6:.0f} MB", f"{read_wall:.3f} s"),
                    *(f"{wall:.3f} s", f"{wall / read_wall:.2f}"),
                    *(f"{cpu:.3f} s", f"{cpu / read_cpu:.2f}" if read_cpu else ""),
                    *(f"{peak / 1e6:.0f} MB", f"{peak / weights:.2f}"),
                )
            )
    print_table(HEADER, rows)


def load(name: str, file: Path) -> float:
    """Loads and touches every page of the weights, in case they are memory-mapped."""
    with torch.inference_mode():
        model = LOADERS[name](file)
        return sum(float(p.flatten()[::PAGE].sum()) for p in model.parameters())


def peak_memory(name: str, file: Path) -> int:
    """The most bytes by which this process grows while it loads."""
    before = _memory("VmRSS")
    load(name, file)
    return _memory("VmHWM") - before


def _memory(entry: str) -> int:
    """Bytes of this process; `getrusage` would count the parent's memory at the fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


def write_files(folder: Path, config: str) -> dict[str, Path]:
    """Writes each format and returns its file by name; other files lie in the same folder."""
    theirs = make_model(config)
    theirs.save_pretrained(folder)
    files = {"Hugging Face": folder / "model.safetensors", "fairseq 0.12": folder / "model.pt"}
    torch.save(_fairseq(theirs), files["fairseq 0.12"])
    words = "".join(f"word{i} 1\n" for i in range(theirs.config.tgt_vocab_size - 4))
    for language in ("de", "en"):
        (folder / f"dict.{language}.txt").write_text(words)
    model, tokenizer = load_fairseq(files["fairseq 0.12"], text="segmented")
    files["ours"] = folder / "model.ckpt"
    save_checkpoint(model, tokenizer, files["ours"])
    return files


def _fairseq(model: Any) -> dict[str, Any]:
    """A checkpoint as fairseq 0.12 saves it, without the optimizer's state."""
    config = model.config
    sides = {
        f"{side}_{theirs}": getattr(config, ours if "{}" not in ours else ours.format(side))
        for side in ("encoder", "decoder")
        for theirs, ours in (
            *(("embed_dim", "d_model"), ("layers", "{}_layers")),
            *(("attention_heads", "{}_attention_heads"), ("ffn_embed_dim", "{}_ffn_dim")),
        )
    }
    settings = Namespace(arch="transformer", share_all_embeddings=True, **sides)
    task = {"_name": "translation", "source_lang": "de", "target_lang": "en"}
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in model.state_dict().items()
        if "embed_positions" not in name
    }
    return {"args": None, "cfg": {"model": settings, "task": task}, "model": weights}


if __name__ == "__main__":
    main()
