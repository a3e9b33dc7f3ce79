"""Write a trained pipeline as the folder that is shipped.

    python -m kinora.pipelines.tiny.train.export runs/dit/pipeline --out pipelines/tiny/weights

Denoiser and autoencoder are stored in half precision (they load as float32 or whatever the caller
asks for), the text encoder, which is small, in float32. Safetensors throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKLWan, WanPipeline

from .whole_clip import copy_statistics

LIMIT_BYTES = 40_000_000


def export(source: Path, out: Path, autoencoder: Path | None = None) -> int:
    """Write the pipeline in `source` to `out`; returns the bytes written.

    `autoencoder` names a folder with a better decoder for the same latents.

    Raises:
        ValueError: the result is larger than `LIMIT_BYTES`.
    """
    pipe = WanPipeline.from_pretrained(source, dtype=torch.float32)
    if autoencoder:
        better = AutoencoderKLWan.from_pretrained(autoencoder, dtype=torch.float32)
        copy_statistics(pipe.vae, better)
        pipe.register_modules(vae=better)
    pipe.transformer.to(torch.float16)
    pipe.vae.to(torch.float16)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        draft = Path(folder)
        pipe.save_pretrained(draft)
        for file in draft.rglob("*.json"):
            _forget_source(file)
        size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
        if size > LIMIT_BYTES:
            raise ValueError(
                f"{source} makes {size:,} bytes; at most {LIMIT_BYTES:,} may be shipped"
            )
        # What stands in `out` already and is no part of the pipeline (the model card) stays.
        for part in draft.iterdir():
            old = out / part.name
            if old.is_dir():
                shutil.rmtree(old)
            out.mkdir(exist_ok=True)
            os.replace(part, old)
    return size


def _forget_source(file: Path) -> None:
    """Drop the path that a part was loaded from, which means nothing elsewhere."""
    values = json.loads(file.read_text())
    if values.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(values, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a trained kinora-tiny for shipping.")
    parser.add_argument("source", type=Path, help="folder of a trained pipeline")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of a better decoder (default: that of source)"
    )
    options = parser.parse_args(argv)
    size = export(options.source, options.out, options.autoencoder)
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
