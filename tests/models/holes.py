"""Checkpoints without contents, and what converting one costs in memory."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from lazulite.models.convert import convert
from lazulite.models.gguf_writer import convert_gguf
from lazulite.quant import Format, Quantizer


def sparse(path: Path, shapes: dict[str, list[int]], dtype: str) -> None:
    """A .safetensors file of a 2-byte dtype that is one hole after its header: it takes no room on the disk."""
    ends = np.cumsum([2 * int(np.prod(shape)) for shape in shapes.values()]).tolist()
    rows = {name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            for (name, shape), begin, end in zip(shapes.items(), [0, *ends], ends, strict=False)}  # fmt: skip
    header = json.dumps(rows).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + ends[-1])


def growth(source: Path, dest: Path, quantized: bool = False) -> int:
    """Bytes by which a process of its own grows from its first tensor on while it converts."""
    return int(subprocess.check_output([sys.executable, __file__, source, dest, *["q"] * quantized]))


def _kilobytes(field: str) -> int:
    return int(re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _main(source: str, dest: str, *quantized: str) -> None:
    begun = []
    write = convert_gguf if dest.endswith(".gguf") else convert
    options = {"quantize": Quantizer(Format(64, 4))} if quantized else {}
    write(source, dest, **options, progress=lambda done, _: begun.append(_kilobytes("VmRSS")) if done == 1 else None)
    print(1024 * (_kilobytes("VmHWM") - begun[0]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
