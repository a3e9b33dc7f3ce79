"""`accelerate`: a recipe on a stock pipeline, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from os import PathLike
from typing import Any

import torch

from ...kernels.dense import DenseKernel, explain
from ...kernels.precision import INPUT
from ..errors import AccelerationError, RecipeError
from ..policies import CachePolicy
from ..receipt import Receipt
from ..recipe import Recipe, find
from ..steps import Skip, StepPolicy
from . import parallel, routes, schedulers
from .caching import Caching
from .denoisers import Denoiser, denoisers_of, refuse_accelerated
from .entered import Called, Entry, entered
from .forward import Forward
from .guidance import Guidance
from .pruning import Pruning
from .run import Run
from .skipping import check_fits, check_handed_on, check_untouched, hollow, instead
from .steps import watched


@contextmanager
def accelerate(
    pipe: Any, recipe: Recipe | str | PathLike[str], *, strict: bool = False, seed: int = 0
) -> Generator[Session, None, None]:
    """Accelerate every run of `pipe` in the body, as `recipe` says.

        with accelerate(pipe, "balanced") as session:
            video = pipe(prompt).frames[0]
        print("\\n".join(session.receipt.words()))

    The pipeline is changed on its instances only and is as before afterwards, whatever happened;
    a run that was broken off leaves nothing behind for the next one. Text encoders and
    cross-attention are not touched. It is to be called from one thread at a time.

    Args:
        pipe: any diffusers pipeline.
        recipe: a recipe, the name of a preset or the path of a TOML file.
        strict: raise where a part of the recipe would not run as asked.
        seed: of methods that draw at random.

    Raises:
        AccelerationError: this pipeline cannot be accelerated so; in strict mode, a fallback.
        RecipeError: there is no such recipe, or one built in code that no file could say.
    """
    if not isinstance(recipe, Recipe | str | PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RecipeError(
            f"the recipe is a {type(recipe).__name__}: give a preset's name, the path of a TOML "
            f"file or a Recipe"
        )
    chosen = recipe if isinstance(recipe, Recipe) else find(str(recipe))
    session = Session(pipe, chosen, strict=strict, seed=seed)
    with ExitStack() as stack:
        if chosen.empty:
            refuse_accelerated(pipe)  # its receipt would say that the stock pipeline ran
        else:
            session.attach(stack)
        yield session


class Session:
    """A recipe attached to a pipeline; `receipt` says what ran last."""

    def __init__(self, pipe: Any, recipe: Recipe, *, strict: bool, seed: int) -> None:
        self.pipe, self.recipe, self.strict, self.seed = pipe, recipe, strict, seed
        # Now, since a recipe that has none is better refused before a run than after it.
        self._table = recipe.table()
        self._denoisers: list[Denoiser] = []
        self._scheduler: Any = None
        self._run: Run | None = None
        self._cache: Caching | None = None
        self._pruning: Pruning | None = None
        self._ranks: parallel.Ranks | None = None
        self._guidance: Guidance | None = None
        self._control: Any = None
        """In the form of what a ControlNet returns."""

    @property
    def receipt(self) -> Receipt:
        """What was asked for and what ran, in the last run so far."""
        attention = None
        if self.recipe.attends:
            names = [name for it in self._denoisers for name in it.layer_names()]
            asked = self.recipe.attention_words()
            method = self.recipe.attention
            precision = str(method.precision() if method else INPUT)
            attention = (self._run or self._new_run(steps=1)).receipt(asked, precision, names)
        return Receipt(
            recipe=self._table,
            strict=self.strict,
            steps=self._run.done if self._run else None if self.recipe.empty else 0,
            skipped=self._run.skipped if self._run else 0,
            attention=attention,
            policy=(self._run or self._new_run(steps=1)).steps_receipt(),
            cache=self._cache.receipt() if self._cache else None,
            processes=self.recipe.parallel.processes if self.recipe.parallel else 1,
        )

    @property
    def _policy(self) -> StepPolicy | None:
        """The step policy, if it skips steps."""
        policy = self.recipe.steps
        return None if isinstance(policy, CachePolicy) else policy

    @property
    def _attends(self) -> bool:
        """Whether attention comes to this session."""
        asked = self.recipe.parallel
        return self.recipe.attends or (asked is not None and asked.tokens > 1)

    def attach(self, stack: ExitStack) -> None:
        """Put everything on; `stack` takes it off again, last first."""
        self._denoisers += denoisers_of(self.pipe, attends=self._attends)
        scheduler = self._scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is None:
            raise AccelerationError(f"{type(self.pipe).__name__} has no scheduler to follow")
        self._check_policy(scheduler)
        if isinstance(self.recipe.steps, CachePolicy):
            cache = Caching(self.recipe.steps, self._denoisers, self.pipe)
            cache.check(sparse=self.recipe.attention is not None, strict=self.strict)
            self._cache = cache
        if self._policy is not None and self._policy.prunes():
            pruning = self._pruning = Pruning(self._denoisers, self.seed)
            pruning.check()
            pruning.attach(stack)
        self._share(stack)
        for denoiser in self._denoisers:
            stack.enter_context(entered(denoiser.module, partial(self._forward, denoiser)))
            if self.recipe.dense_kernel not in ("stock", "fastest"):
                self._check_kernel(denoiser, self.recipe.dense_kernel)
            if self._attends and denoiser.family.dispatches:
                modules = dict(denoiser.inner.named_modules())
                processors = [modules[it.name].processor for it in denoiser.attentions]
                if not all(hasattr(it, "_attention_backend") for it in processors):
                    names = sorted({type(it).__name__ for it in processors})
                    raise AccelerationError(
                        f"attention processors that do not dispatch stand in "
                        f"{denoiser.family.denoiser} ({', '.join(names)}): set its own again"
                    )
                if len({id(it) for it in processors}) < len(processors):
                    raise AccelerationError(
                        f"{denoiser.family.denoiser} shares attention processors between layers, "
                        f"which hides the layer of a call: give each its own"
                    )
                denoiser.stock = stack.enter_context(routes.routed(processors))
            if self._attends and self._cache is not None:
                named = dict(denoiser.inner.named_modules())
                stack.enter_context(routes.announced(named[it.name] for it in denoiser.attentions))
        control = getattr(self.pipe, "controlnet", None)
        # Beside two denoisers it would not be known whose step it is.
        if self._policy is not None and control is not None and len(self._denoisers) == 1:
            stack.enter_context(entered(control, self._beside))
        stack.enter_context(watched(scheduler, self._start, self._step, self._stepped))
        if self._cache is not None:
            stack.callback(self._cache.stop)

    def _check_policy(self, scheduler: Any) -> None:
        """Raise AccelerationError where steps of the scheduler cannot be skipped."""
        policy = self._policy
        refusal = policy and schedulers.refusal(scheduler, policy)
        if refusal:
            raise AccelerationError(refusal)

    def _share(self, stack: ExitStack) -> None:
        """Share the denoisers with other processes. Raises AccelerationError."""
        asked = self.recipe.parallel
        if asked is None:
            return
        for it in self._denoisers:
            refused = parallel.refusal(self.recipe, it.family.denoiser, it.inner.config)
            if not refused and it.module is not it.inner:
                refused = f"{it.family.denoiser} is compiled: use [parallel] without torch.compile"
            if refused:
                raise AccelerationError(refused)
        device = torch.device(getattr(self.pipe, "device", self._denoisers[0].inner.device))
        self._ranks = ranks = parallel.joined(asked, device)
        if asked.cfg > 1:
            self._guidance = Guidance(ranks)
        for it in self._denoisers:
            stack.enter_context(parallel.shared(it.inner, ranks))

    def _check_kernel(self, denoiser: Denoiser, name: DenseKernel) -> None:
        """Raise AccelerationError where the dense kernel is known not to run."""
        # Parts that are offloaded stand elsewhere until they run.
        device = getattr(self.pipe, "_execution_device", denoiser.inner.device)
        refusal = explain(name, device=device.type, dtype=denoiser.inner.dtype)
        if refusal:
            raise AccelerationError(refusal)

    def _forward(self, denoiser: Denoiser, call: Called) -> Any:
        """A call of a denoiser: of itself, or what stands for it."""
        given = call.given
        run = self._running(denoiser.family.denoiser, given)
        run.take_turn(denoiser.number)
        if run.branch == 0:
            run.batch = given[denoiser.family.latents].shape[0]
        decision = run.decide()
        if isinstance(decision, Skip):
            result = instead(decision.output, denoiser, given)
        else:
            result = self._guided(denoiser, run, given, call)
            denoiser.kind, denoiser.dtype = type(result), result[0].dtype
            denoiser.shape = tuple(result[0].shape[1:])
        run.denoiser = denoiser
        run.forwards += 1
        run.branch += 1
        return result

    def _guided(self, denoiser: Denoiser, run: Run, given: Mapping[str, Any], call: Called) -> Any:
        """A call of a denoiser, of which other processes may make a branch."""
        guidance = self._guidance
        if guidance is None:
            return self._evaluated(denoiser, run, given, call)
        if not guidance.batched(denoiser, given):
            evaluated = partial(self._evaluated, denoiser, run, given, call)
            return guidance.separate(denoiser, run, evaluated)
        half = guidance.half(denoiser, given)
        result = self._evaluated(denoiser, run, {**given, **half}, partial(call, **half))
        return guidance.whole(result)

    def _beside(self, call: Called) -> Any:
        """A call of a ControlNet: in skipped steps nothing looks at what it returns."""
        run = self._running(type(self.pipe.controlnet).__name__, call.given)
        if isinstance(run.decide(), Skip):
            return self._control
        result = call()
        self._control = hollow(result)
        return result

    def _running(self, name: str, given: Mapping[str, Any]) -> Run:
        """The run to which a call of the module of this name belongs, told where it begins."""
        run = self._run
        if run is None or run.over or self.pipe.scheduler is not self._scheduler:
            raise AccelerationError(
                f"{name} is called by steps that cannot be followed: run the "
                f"pipeline that is accelerated, with the scheduler that it had then"
            )
        if run.begun:
            return run
        run.begun, run.first = True, _first_step(self._scheduler, given)
        if run.policy is not None:
            refusal = run.policy.refuses(run.steps, run.first)
            if refusal:
                raise AccelerationError(refusal)
            run.schedule = schedulers.schedule_of(self._scheduler)
            if self.strict and run.schedule.why_raw:
                raise AccelerationError(
                    f"strict: outputs would be extrapolated as they come, since "
                    f"{run.schedule.why_raw}; change the scheduler, or allow fallbacks "
                    f"(strict=False, --no-strict)"
                )
        return run

    def _evaluated(
        self, denoiser: Denoiser, run: Run, given: Mapping[str, Any], call: Callable[[], Any]
    ) -> Any:
        """A call of the denoiser itself, with the cache and the attention of the recipe."""
        cache, forward = self._cache, None
        if self._pruning is not None:
            call = partial(self._pruning.call, denoiser, run, given, call)
        if self._attends:
            call, forward = self._attended(denoiser, run, given, call)
        result, whole = (call(), True) if cache is None else cache.call(denoiser, run, given, call)
        # Of what is reused no attention comes.
        if forward is not None and whole:
            forward.check_complete()
        return result

    def _attended(
        self, denoiser: Denoiser, run: Run, given: Mapping[str, Any], call: Callable[[], Any]
    ) -> tuple[Callable[[], Any], Forward]:
        """A call of the denoiser whose attention comes to this session, and what hears it."""
        forward = Forward(
            denoiser, run, given, self.recipe, strict=self.strict, seed=self.seed, ranks=self._ranks
        )

        def attended() -> Any:
            token = routes.active.set(forward)
            try:
                with nullcontext() if denoiser.family.dispatches else routes.TakeOver():
                    return call()
            finally:
                routes.active.reset(token)

        return attended, forward

    def _new_run(self, steps: int) -> Run:
        attention = self.recipe.attention
        agree = self._ranks.agree if self._ranks else None
        return Run(attention.start() if attention else None, self._policy, steps, agree)

    def _start(self) -> None:
        timesteps = self.pipe.scheduler.timesteps
        self._run = self._new_run(steps=len(timesteps))
        if self._pruning is not None:
            self._pruning.start()
        if self._guidance is not None:
            self._guidance.start()
        if self._cache is not None:
            self._cache.start(timesteps.tolist())

    def _step(self, given: Mapping[str, Any]) -> None:
        run = self._run
        if run is None:
            return
        if run.forwards == 0:
            replaced = [
                it.family.denoiser
                for it in self._denoisers
                if not isinstance(vars(it.module).get("_compiled_call_impl"), Entry)
            ]
            raise AccelerationError(
                f"{replaced[0]} was compiled while accelerated: compile it before the block"
                if replaced
                else "the first step ended without a call of the accelerated denoiser: "
                "the pipeline uses another one, or another pipeline shares its scheduler: give "
                "each its own, by type(scheduler).from_config(scheduler.config)"
            )
        output, sample = given["model_output"], given["sample"]
        if run.policy is not None:
            refusal = schedulers.refused_arguments(given)
            if refusal:
                raise AccelerationError(refusal)
            check_untouched(sample, run.sample)
            assert run.denoiser is not None
            if isinstance(run.decision, Skip):
                check_handed_on(output, run.decision.output, run.denoiser.dtype)
            else:
                check_fits(output, run.denoiser, run.batch)
        if self._guidance is not None and run.denoiser is not None:
            skipped = isinstance(run.decision, Skip)
            self._guidance.finish_step(run.denoiser, output, skipped=skipped)
        run.finish_step(output, sample)
        if self.strict and run.inert:
            raise AccelerationError(
                f"strict: {run.inert}: leave steps.prune out, or allow it to do nothing "
                f"(strict=False, --no-strict)"
            )
        if self.strict and self._cache is None and run.never_sparse:
            raise AccelerationError(
                f"strict: all attention ran dense {run.never_sparse}; change the recipe, or allow "
                f"it (strict=False, --no-strict)"
            )
        if self._cache is not None:
            self._cache.finish_step(run, strict=self.strict)

    def _stepped(self, sample: torch.Tensor) -> None:
        if self._run is not None and self._run.policy is not None:
            self._run.sample = sample


def _first_step(scheduler: Any, given: Mapping[str, Any]) -> int:
    """Where in the schedule a run begins, from its first call of a denoiser."""
    told = getattr(scheduler, "begin_index", None)
    if told is not None:
        return int(told)
    # Schedulers without one are told the timestep itself; of tokens that are given, it is 0.
    timestep = float(torch.as_tensor(given["timestep"]).max())
    distance = (scheduler.timesteps.cpu().double() - timestep).abs()
    return int(distance.argmin()) if float(distance.min()) < 0.5 else 0
