"""`decode`: finishes saved latents with the same autoencoder and the same post-processing."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from . import cards, files, models, sidecar
from .errors import GenerationError, ModelError, OutputError
from .events import Progress
from .request import DEFAULT_OUTPUT, Format, Request, resolve
from .run import Run, StageClock
from .worker import Channel, Event, stream


def decode(
    latents: Path,
    *,
    model: str | None = None,
    output: str = DEFAULT_OUTPUT,
    media: Format | None = None,
    device: str = "auto",
) -> Generator[Event, None, None]:
    """Decode a latents file into media file and sidecar; yields events and last a `Run`.

    On the same machine the frames equal, bit for bit, those of the run that saved the latents.
    `model` replaces the one that the file names; the file itself is kept. Raises `KinoraError`.
    """
    return stream(lambda channel: _decode(latents, model, output, media, device, channel))


def _decode(
    path: Path,
    model: str | None,
    output: str,
    media: Format | None,
    device: str,
    channel: Channel,
) -> Run:
    clock = StageClock("load")
    channel.emit(Progress("load", 0, 0, clock.elapsed_s, None, 1, 1))
    from . import frames as frame_ops
    from . import latents as latent_files
    from .chatter import relayed
    from .saving import save

    saved = latent_files.read(path)
    before = saved.record.request
    wanted = {"output": output, "model": model or before.model, "device": device, "format": media}
    card = cards.find(str(wanted["model"]))
    request = resolve(Request.model_validate({**before.model_dump(), **wanted}), card)
    weights = models.locate(card)
    place = models.place(card, device, before.dtype)
    request = request.model_copy(update={"device": place.device})
    destination = files.prepare(request)
    clock.device = place.device
    try:
        with relayed(channel.notice):
            vae = _autoencoder(weights, saved, place.device)
        channel.check()
        clock.switch("decode")
        channel.emit(Progress("decode", 0, 0, clock.elapsed_s, None, 1, 1))
        frames = frame_ops.from_decoded(
            _run(vae, saved.calls, place.device), normalised=saved.state.normalised
        )
        channel.check()
        here = sidecar.machine(place.device)
        record = saved.record.model_copy(update={"request": request, "machine": here})
        stem = files.reserve(destination, destination.stem_for(request))
        try:
            result = save(destination, record, frames, clock, stem=stem, kept=path, original=None)
        except OutputError as error:
            raise OutputError(f"{error}; the latents stay in {path}", latents=path) from error
    except BaseException:
        destination.withdraw()
        raise
    return Run(request, (result,), clock.total(), here.device, here.versions)


def _autoencoder(weights: models.Weights, saved: Any, device: str) -> Any:
    """The autoencoder alone, as it was at the moment of decoding."""
    import diffusers
    import torch

    folder = weights.folder
    name = folder.parts.get("vae", "")
    found: Any = getattr(diffusers, name, None)
    if found is None:
        raise ModelError(f"{folder.path} has no autoencoder that diffusers knows (vae: {name!r})")
    loaded_as = getattr(torch, saved.record.model.vae_dtype)
    options: dict[str, Any] = {"dtype": loaded_as, "use_safetensors": True}
    if weights.variant is not None:
        options["variant"] = weights.variant
    try:
        vae = found.from_pretrained(str(folder.path / "vae"), local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder.path / 'vae'} cannot be loaded: {reason}") from error
    vae = vae.to(torch.device(device), dtype=getattr(torch, saved.state.vae_dtype))
    if saved.state.tiling:
        vae.enable_tiling()
    if saved.state.slicing:
        vae.enable_slicing()
    return vae


def _run(vae: Any, calls: Any, device: str) -> Any:
    import torch

    try:
        with torch.no_grad():
            parts = [
                vae.decode(**{key: it.to(device) for key, it in call.items()}, return_dict=False)[0]
                for call in calls
            ]
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise GenerationError(
            f"decoding failed: {type(error).__name__}: {reason}; the latents are untouched"
        ) from error
    return parts[0] if len(parts) == 1 else torch.cat(parts)
