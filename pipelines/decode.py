"""`decode`: finishes saved latents with the same autoencoder and the same post-processing."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cards, files, memory, models, room, sidecar
from . import latents as latent_files
from .errors import Cancelled, GenerationError, OutputError
from .events import Progress, Stage
from .folder import fingerprint
from .request import DEFAULT_OUTPUT, Format, Request, resolve
from .run import Run, StageClock
from .worker import Channel, Event, stream

if TYPE_CHECKING:
    from .latents import Latents


def decode(
    latents: Path,
    *,
    model: str | None = None,
    output: str = DEFAULT_OUTPUT,
    media: Format | None = None,
    device: str = "auto",
    force: bool = False,
) -> Generator[Event, None, None]:
    """Decode a latents file into media file and sidecar; yields events and last a `Run`.

    On the same machine the frames equal, bit for bit, those of the run that saved the latents.
    `model` replaces the one that the file names; the file itself is kept. `force` goes on where
    predicted memory or disk is too small. Closing the generator stops at the next chunk of frames.
    Raises `KinoraError`, before anything is loaded where possible.
    """
    wanted: dict[str, Any] = {"output": output, "format": media, "device": device, "force": force}
    if model is not None:
        wanted["model"] = model
    return stream(lambda channel: _decode(latents, wanted, channel))


def _decode(path: Path, wanted: dict[str, Any], channel: Channel) -> Run:
    """Decode with `wanted` in place of the fields of the request that made the latents."""
    clock = StageClock("load")
    header = latent_files.read_header(path)
    asked = Request.model_validate({**header.record.request.model_dump(), **wanted})
    card = cards.find(asked.model)
    request = resolve(asked, card, read_image=False)
    weights = models.locate(card)
    destination = files.prepare(request, with_latents=False)
    try:
        channel.check()
        place = models.place(card, request.device, request.dtype)
        clock.device = place.device
        request = request.model_copy(update={"device": place.device})
        predicted = memory.estimate(
            weights.folder,
            weights.numel,
            None,
            pixels=(request.frames, request.height, request.width),
            dtype=place.dtype,
            vae_dtype=header.decode.vae_dtype,
            resident=False,
        )
        room.check_memory(predicted, request, "another --device", channel.notice)
        room.check_disk(destination, request, 0, channel.notice)
        saved = latent_files.read(path)
        channel.emit(Progress("load", 0, 0, clock.elapsed_s, None, 1, 1))
        from . import frames as frame_ops
        from .chatter import relayed
        from .saving import save

        vae_dtype = saved.record.model.vae_dtype
        made_with = sidecar.model(card, fingerprint(weights.files), vae_dtype)
        before = saved.record.model  # whose scheduler has done its work
        scheduler = {name: getattr(before, name) for name in ("scheduler", "scheduler_sha256")}
        made_with = made_with.model_copy(update=scheduler)
        here = sidecar.machine(place.device)
        changed = sidecar.differences(saved.record, made_with, here)
        if changed:
            channel.notice(f"since the latents were saved, this changed: {'; '.join(changed)}")
        channel.check()
        with relayed(channel.notice):
            vae = _autoencoder(weights, saved, place.device)
        channel.check()
        clock.switch("decode")
        channel.emit(Progress("decode", 0, 0, clock.elapsed_s, None, 1, 1))
        frames = frame_ops.from_decoded(
            _run(vae, saved, place.device, channel), normalised=saved.state.normalised
        )
        told = frame_ops.changed_shape(frames, request, card.pipeline)
        if told is not None:
            channel.notice(told)
        channel.check()
        now = {"request": request, "model": made_with, "machine": here, "created": sidecar.now()}
        record = saved.record.model_copy(update=now)
        spent = saved.record.stages_s.items()
        earlier: dict[Stage, float] = {
            stage: s for stage, s in spent if stage in ("text", "denoise")
        }
        stem = files.reserve(destination, destination.stem_for(request))
        try:
            result = save(destination, record, frames, clock, stem=stem, kept=path, earlier=earlier)
        except OutputError as error:
            raise OutputError(f"{error}; the latents stay in {path}", latents=path) from error
    except BaseException:
        destination.withdraw()
        raise
    return Run(request, (result,), clock.total(), here.device, here.versions)


def _autoencoder(weights: models.Weights, saved: Latents, device: str) -> Any:
    """The autoencoder alone, as it was at the moment of decoding."""
    import torch

    vae = models.load_part(weights, "vae", saved.record.model.vae_dtype).to(torch.device(device))
    decoded_as = getattr(torch, saved.state.vae_dtype)
    if vae.dtype != decoded_as:
        vae = vae.to(decoded_as)
    if saved.state.tiling:
        vae.enable_tiling()
    if saved.state.slicing:
        vae.enable_slicing()
    return vae


def _run(vae: Any, saved: Latents, device: str, channel: Channel) -> Any:
    import torch

    from .frames import check_finite
    from .taps import stoppable

    try:
        with torch.no_grad(), stoppable(vae, channel.check):
            parts = [
                vae.decode(**{key: it.to(device) for key, it in call.items()}, return_dict=False)[0]
                for call in saved.calls
            ]
    except Cancelled:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise GenerationError(
            f"decoding failed: {type(error).__name__}: {reason}; the latents are untouched"
        ) from error
    check_finite(parts, "decoding", saved.state.vae_dtype)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
