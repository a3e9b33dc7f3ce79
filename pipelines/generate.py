"""`generate`: from a request to files, through a stock diffusers pipeline, in one worker thread."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accel.receipt import Receipt
from . import cards, images, memory, models, planning, room, sidecar, together, vocabulary
from .cards import Card
from .errors import Cancelled, GenerationError, KinoraError
from .events import DOING, Progress, Stage
from .files import Destination
from .request import Request, Resolved, resolve
from .run import Output, Run, StageClock
from .sidecar import Record
from .worker import Channel, Event, stream

if TYPE_CHECKING:
    from ..accel.attach import Session
    from ..accel.recipe import Recipe
    from .media import Frames
    from .preview import Previewer
    from .saving import Kept


def generate(
    request: Request,
    *,
    shelf: models.Shelf | None = None,
    original: Record | None = None,
    finished: list[Output] | None = None,
    unfinished: list[Kept] | None = None,
    stop: threading.Event | None = None,
    destination: Destination | None = None,
    share: Callable[[], None] | None = None,
    previews: bool = False,
) -> Generator[Event, None, None]:
    """Make what `request` asks for; yields `Progress` and `Notice`, and last the `Run`.

    Everything that can be refused is refused before the model is loaded. Closing the generator
    stops within a step and leaves nothing of the unfinished video, or its latents once those are
    being decoded; so does setting `stop`, from any thread, which then raises `Cancelled` here.
    `shelf` keeps the model for the caller's next request; another run may have it while the last
    video is being saved. With `original`, the outputs say whether they equal it bit for bit.
    `finished` gets each output once it is on disk: also of a run that fails later or is stopped.
    `unfinished` gets the latents of a video that was stopped while being decoded.
    `destination` is where files are written that are to be moved to `request.output` afterwards.
    `share` is called once nothing is refused any more, and no other run of `shelf` is under way.
    With `previews`, some steps of models of which that is known come with a picture of what the run
    is heading for; it changes nothing else, and the time for it is not counted.

    Raises `KinoraError`: see `errors`; where latents were saved, `error.latents` names them.
    """
    shelf, finished = shelf or models.Shelf(), [] if finished is None else finished
    unfinished = [] if unfinished is None else unfinished
    caller = _Caller(shelf, original, finished, unfinished, destination, share, previews)
    return stream(lambda channel: _generate(request, caller, channel), stop)


@dataclass(frozen=True, slots=True)
class _Caller:
    """What the caller of `generate` lends, and what it gets besides events."""

    shelf: models.Shelf
    original: Record | None
    finished: list[Output]
    unfinished: list[Kept]
    destination: Destination | None
    share: Callable[[], None] | None
    previews: bool


def _generate(request: Request, caller: _Caller, channel: Channel) -> Run:
    clock = StageClock("load")
    from .chatter import relayed

    card = cards.find(request.model)
    resolved = resolve(request, card)
    weights = models.locate(card)
    seat = together.seat(resolved.recipe)
    device = resolved.device if seat is None else seat.device(resolved.device)
    place = models.place(card, device, resolved.dtype)
    channel.check()
    resolved = resolved.model_copy(update={"device": place.device, "dtype": place.dtype})
    _warn(weights, resolved, channel)
    outputs: list[Output] = []
    recipe, needs = planning.recipe(resolved, weights, channel.notice)
    shelf, destination = caller.shelf, caller.destination
    clock.switch("load")
    stack = ExitStack()
    try:
        with shelf.reserved(channel.check):
            clock.skip()
            predicted = memory.estimate(
                weights.folder,
                weights.numel,
                card.grid(resolved.width, resolved.height, resolved.frames),
                pixels=(resolved.frames, resolved.height, resolved.width),
                dtype=place.dtype,
                vae_dtype=place.vae_dtype,
                resident=shelf.holds(weights, place),
                **needs,
            )
            remedy = "a smaller --size or --frames"
            room.check_memory(predicted, resolved, remedy, channel.notice)
            destination = destination or stack.enter_context(together.destination(seat, resolved))
            kept = resolved.num_videos if resolved.keep_latents else 1
            room.check_disk(destination, resolved, kept, channel.notice)
            # Nothing is refused any more for what could be known without loading.
            channel.emit(Progress("load", 0, 0, clock.elapsed_s, None, 1, resolved.num_videos))
            if caller.share is not None:
                caller.share()
            with relayed(channel.notice):
                loaded = shelf.take(weights, place, channel.check)
                clock.device = place.device
                job = _Job(channel, clock, resolved, card, loaded, destination, caller, recipe)
                job.compare()
                made = job.video(0)
                for index in range(1, resolved.num_videos):
                    outputs.append(job.save(made))
                    made = job.video(index)
            clock.settle()
        outputs.append(job.save(made))
    finally:
        if destination is not None and not outputs:
            destination.withdraw()
        stack.close()
    here = sidecar.machine(place.device)
    leads = seat is None or seat.leads
    return Run(resolved, tuple(outputs), clock.total(), here.device, here.versions, leads)


def _warn(weights: models.Weights, resolved: Resolved, channel: Channel) -> None:
    card = weights.card
    outside = card.outside_training(resolved.width, resolved.height, resolved.frames)
    if outside is not None:
        channel.notice(outside)
    for text in filter(None, (resolved.prompt, resolved.negative_prompt)):
        unknown = vocabulary.warning(card, text)
        for told in filter(None, (unknown, vocabulary.cut(card, weights.folder, text))):
            channel.notice(told)


@dataclass(frozen=True, slots=True)
class _Made:
    """A video that is decoded and not yet saved."""

    index: int
    frames: Frames
    kept: Kept
    record: Record


@dataclass
class _Job:
    """One request on one loaded model."""

    channel: Channel
    clock: StageClock
    resolved: Resolved
    card: Card
    loaded: models.Loaded
    destination: Destination
    caller: _Caller
    recipe: Recipe
    session: Session | None = None
    step_times_s: list[float] = field(default_factory=list[float])
    decode_s: float = 0.0

    def compare(self) -> None:
        """Tell what has changed since the original, if this repeats one."""
        original = self.caller.original
        if original is None or not sidecar.repeats(original, self.resolved):
            return
        changed = sidecar.differences(original, self._model(), self._machine())
        if changed:
            self.channel.notice(f"since the original, this changed: {'; '.join(changed)}")

    def video(self, index: int) -> _Made:
        """Make video `index`; stopped while decoding, its latents are left `unfinished`."""
        from ..accel.attach import accelerate
        from . import frames as frame_ops
        from .encoding import remembered
        from .latents import Calls, DecodeState, Latents, sha256
        from .saving import keep_latents
        from .taps import tapped, without_progress_bar

        single = self.resolved.single(index)
        kept: list[Kept] = []

        def before_decode(calls: Calls, state: DecodeState) -> None:
            self._progress("save", 0, 0, index, latents=True)
            frame_ops.check_finite(calls[-1].values(), "denoising", single.dtype)
            latents = Latents(self._record(single, sha256(calls)), state, calls)
            for earlier in kept:
                earlier.discard()
            kept[:] = [keep_latents(self.destination, latents, latents.record.latents_sha256)]
            self._progress("decode", 0, 0, index)

        pipe, clock = self.loaded.pipe, self.clock
        with self._failing(kept):
            with ExitStack() as stack:
                stack.enter_context(without_progress_bar(pipe))
                assert self.caller.shelf.encodings is not None
                stack.enter_context(remembered(pipe, self.caller.shelf.encodings))
                self.session = stack.enter_context(
                    accelerate(pipe, self.recipe, strict=single.strict, seed=single.seed)
                )
                stack.enter_context(
                    tapped(
                        pipe,
                        clock,
                        check=self.channel.check,
                        before_decode=before_decode,
                        after_text=lambda: self._progress("denoise", 0, single.steps, index),
                    )
                )
                previewer = self._previewing(stack)
                self._progress("text", 0, 0, index)
                clock.switch("denoise")
                frames = frame_ops.from_result(pipe(**self._arguments(single, index, previewer)))
            changed = frame_ops.changed_shape(frames, single, self.card.pipeline)
            if changed is not None:
                self.channel.notice(changed)
            if not kept:
                raise GenerationError(
                    f"{self.card.pipeline} did not decode through its vae: not supported"
                )
            self.decode_s = clock.peek()["decode"]
            return _Made(index, frames, kept[-1], self._record(single, kept[-1].sha256))

    def save(self, made: _Made) -> Output:
        """Write the files of a video; needs the model no more."""
        from .saving import save

        single = made.record.request
        self._progress("save", 0, 0, made.index)
        with self._failing([made.kept]):
            output = save(
                self.destination,
                made.record,
                made.frames,
                self.clock,
                stem=made.kept.stem,
                kept=made.kept.path if single.keep_latents else None,
                original=self.caller.original,
            )
        if not single.keep_latents:
            made.kept.discard()
        self.clock.switch("load")
        self.caller.finished.append(output)
        return output

    @contextmanager
    def _failing(self, kept: list[Kept]) -> Generator[None, None, None]:
        """Have what fails in the body say which latents were `kept` by then."""
        try:
            yield
        except Cancelled:
            self.caller.unfinished.extend(kept)
            raise
        except KinoraError as error:
            if not kept:
                raise
            raise type(error)(f"{error}; {kept[-1].remedy()}", latents=kept[-1].path) from error
        except Exception as error:
            raise self._failure(error, kept[-1] if kept else None) from error

    def _previewing(self, stack: ExitStack) -> Previewer | None:
        """What makes previews, where they are wanted."""
        if not self.caller.previews:
            return None
        from .preview import Previewer

        previewer = Previewer(self.loaded.pipe)
        stack.enter_context(previewer.watching())
        return previewer

    def _preview(self, previewer: Previewer | None) -> bytes | None:
        """A picture, where one is due; the clock stands still for it."""
        if previewer is None or not previewer.due:
            return None
        self.clock.switch(self.clock.stage)
        picture = previewer.picture()
        self.clock.skip()
        return picture

    def _arguments(
        self, single: Resolved, index: int, previewer: Previewer | None
    ) -> dict[str, Any]:
        """What to call the pipeline with: only what its `__call__` accepts."""
        import torch

        wanted: dict[str, Any] = {
            "prompt": single.prompt,
            "height": single.height,
            "width": single.width,
            "num_frames": single.frames,
            "frame_rate": int(single.fps) if single.fps == int(single.fps) else single.fps,
            "num_inference_steps": single.steps,
            "guidance_scale": single.guidance,
            # On the CPU, so that a seed means the same noise on every device.
            "generator": torch.Generator("cpu").manual_seed(single.seed),
            "output_type": "pt",
            "callback_on_step_end": self._on_step(index, previewer),
            **self.card.call,
        }
        if single.image is not None:
            wanted["image"] = images.first_frame(single)
        if single.negative_prompt is not None:
            wanted["negative_prompt"] = single.negative_prompt
        accepted = models.call_parameters(type(self.loaded.pipe))
        return {name: value for name, value in wanted.items() if name in accepted}

    def _on_step(self, index: int, previewer: Previewer | None) -> Any:
        """The pipeline's callback: progress after each step, and the place where a run stops."""
        last_s = self.clock.elapsed_s

        def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal last_s
            self.channel.check()
            now_s = self.clock.elapsed_s
            if step > 0:  # the first step includes the text and any warming up
                self.step_times_s.append(now_s - last_s)
            last_s = now_s
            total = int(getattr(pipe, "num_timesteps", 0) or self.resolved.steps)
            preview = self._preview(previewer) if step + 1 < total else None
            self._progress("denoise", step + 1, total, index, preview=preview)
            return tensors

        return on_step

    def _progress(
        self,
        stage: Stage,
        step: int,
        steps: int,
        index: int,
        *,
        latents: bool = False,
        preview: bytes | None = None,
    ) -> None:
        videos = self.resolved.num_videos
        eta_s = None
        if stage == "denoise" and self.step_times_s:
            left = steps - step + (videos - index - 1) * steps
            # Of a step policy some steps take no time at all.
            middle = statistics.fmean if self.recipe.steps else statistics.median
            per_step = middle(self.step_times_s)
            eta_s = left * per_step + (videos - index) * self.decode_s
        elapsed_s, video = self.clock.elapsed_s, index + 1
        self.channel.emit(
            Progress(stage, step, steps, elapsed_s, eta_s, video, videos, latents, preview)
        )

    def _failure(self, error: Exception, kept: Any) -> GenerationError:
        """An exception of the model as one line, with what was saved."""
        reason = " ".join(str(error).split())[:300]
        told = f"{self.card.name} failed while {DOING[self.clock.stage]}: "
        told += f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        if type(error).__name__ == "OutOfMemoryError":
            told += "; choose a smaller --size or --frames"
        latents: Path | None = None if kept is None else kept.path
        return GenerationError(
            told if kept is None else f"{told}; {kept.remedy()}", latents=latents
        )

    def _model(self) -> sidecar.ModelRecord:
        loaded = self.loaded
        scheduler = getattr(loaded.pipe, "scheduler", None)
        return sidecar.model(self.card, loaded.fingerprint, loaded.place.vae_dtype, scheduler)

    def _machine(self) -> sidecar.Machine:
        return sidecar.machine(self.loaded.place.device)

    def _record(self, single: Resolved, latents_sha256: str) -> Record:
        return Record(
            request=single,
            model=self._model(),
            machine=self._machine(),
            created=sidecar.now(),
            latents_sha256=latents_sha256,
            receipt=self._receipt(),
        ).timed(self.clock.peek())

    def _receipt(self) -> Receipt | None:
        """What ran so far, with the peak of memory."""
        if self.session is None:
            return None
        peak = memory.peak_bytes(self.loaded.place.device)
        return self.session.receipt.model_copy(update={"peak_memory_bytes": peak})
