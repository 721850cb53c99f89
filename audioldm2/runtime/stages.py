"""Where and how a pipeline's stages run: device, dtype, offload, compiling, and one generation at a time.

`StageRunner` is the base class of the pipeline, which itself only says what a generation computes. Inside
`with self.running("unet") as unet:` the stage is on its device and, unless it is compiled, runs with fast
convolutions where the CPU has them. A compiled stage is called through its wrapper, and one that is not this
package's through an adapter (`runtime.foreign`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, ParamSpec, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from audioldm2.models.stage import Stage
from audioldm2.quoting import quoted
from audioldm2.runtime.compile import check_stage_names, compile_stage, compiled, default_mode
from audioldm2.runtime.cpu import FastConvolutions, fast_convolutions
from audioldm2.runtime.device import available_device
from audioldm2.runtime.foreign import adapted
from audioldm2.runtime.offload import Offload
from audioldm2.runtime.precision import cast, check_dtype, stage_device, stage_dtype
from audioldm2.runtime.profiling import recorded
from audioldm2.runtime.progress import NotebookScreen, notebook_screen, progress_bar, tqdm

RunnerT = TypeVar("RunnerT", bound="StageRunner")
P = ParamSpec("P")
R = TypeVar("R")


class StageRunner:
    """The stages of a pipeline, kept as attributes under the names in `stage_names`."""

    stage_names: ClassVar[tuple[str, ...]]  # in the order in which they run
    scheduler: Any
    main_stage: ClassVar[str]  # the one whose device and dtype are the pipeline's

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._offload: Offload | None = None
        self._compiled: WeakSet[nn.Module] = WeakSet()
        self._fast: FastConvolutions | None = None
        self._working: tuple[str, nn.Module] | None = None
        self._depth = 0
        self._progress: dict[str, Any] = {}
        self._screen: NotebookScreen | None = None  # for the progress bars of one generation

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "_offload": None if self._offload is None else self._offload.device}
        # A copy is not in the middle of a generation, and compiled code is not copied.
        for name in ("_lock", "_compiled", "_fast", "_working", "_depth", "_screen"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        StageRunner.__init__(self)
        offload = state.pop("_offload")
        vars(self).update(state)
        if offload is not None:
            self.enable_model_cpu_offload(device=offload)

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The parts that have weights, by name."""
        return {name: getattr(self, name) for name in self.stage_names}

    @property
    def device(self) -> torch.device:
        """The device on which the stages run."""
        return self._offload.device if self._offload else stage_device(getattr(self, self.main_stage))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the main stage, the UNet, runs."""
        return stage_dtype(getattr(self, self.main_stage))

    def to(
        self: RunnerT,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> RunnerT:
        """Move all stages to a device, convert them to a dtype, or both: `to("cuda")`, `to(torch.float16)`.

        Parameters that need float32's range stay float32 in float16 (see `runtime.precision`).

        Args:
            device: the device, or the dtype alone.
            dtype: a floating-point dtype.
            silence_dtype_warnings: accepted for diffusers, whose warnings are not given here: every dtype
                runs on every device.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: a device that is not available, a dtype that is not supported, or a device after
                `enable_model_cpu_offload`.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        check_dtype(dtype)
        if device is not None:
            device = available_device(device)
        with self._lock:
            if device is not None and self._offload is not None:
                raise ValueError(
                    "enable_model_cpu_offload() moves the stages by itself; do not call to() after it"
                )
            for stage in self.stages.values():
                if dtype is not None:
                    cast(stage, dtype)
                if device is not None:
                    stage.to(device)
        return self

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str = "cuda"
    ) -> None:
        """Keep the stages on the CPU, and move each to the device only while it runs.

        If the device is a GPU, the next stage is copied while the current one runs.

        Args:
            gpu_id: index of the GPU; 0 by default.
            device: where stages run.

        Raises:
            ValueError: the device is not available, it has an index in addition to `gpu_id`, or it is a GPU
                and stages are compiled already.
        """
        device = torch.device(device) if isinstance(device, torch.device) else available_device(device)
        if gpu_id is not None and device.index is not None:
            raise ValueError(f"gpu_id = {gpu_id} and device = {device} both have an index; give it once")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", gpu_id or 0)
        device = available_device(device)
        with self._lock:
            if self._compiled and device.type == "cuda":  # CUDA graphs store the addresses of the weights
                raise ValueError("call enable_model_cpu_offload() before compile()")
            if self._offload is not None:
                self._offload.release()
                self._offload = None
            self.to("cpu")
            self._offload = Offload(device)

    def compile(self, mode: str | None = None, stages: Sequence[str] | None = None) -> None:
        """Compile stages with torch.compile, each as one graph, at their first call; this can take minutes.

        They are compiled once for each duration, batch size and number of candidates, and for each multiple
        of 16 tokens to which prompts are padded. PyTorch caches compiled code on disk for the next process
        (see TORCHINDUCTOR_CACHE_DIR in its documentation). A copied or unpickled pipeline has to be compiled
        again.

        Args:
            mode: torch.compile's "default", "reduce-overhead" or "max-autotune". By default "reduce-overhead"
                (CUDA graphs) on a GPU, and "default" on a CPU and with offload, where weights move.
            stages: the names of the parts to compile, such as ["unet"]; all by default.

        Raises:
            ValueError: a name that is not a stage's, or a stage that is not this package's.
        """
        with self._lock:
            mode = mode or ("default" if self._offload else default_mode(self.device))
            for name in check_stage_names(stages):
                stage = getattr(self, name)
                if not isinstance(stage, Stage):
                    raise ValueError(
                        f"compile() cannot compile pipe.{name}, a {type(stage).__name__}; compile it as in "
                        f"pipe.{name} = torch.compile(pipe.{name}), and choose the others by stages="
                    )
                compile_stage(name, stage, mode)
                self._compiled.add(stage)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options for the progress bars.

        Args:
            options: tqdm's; `disable=True` turns the bars off.
        """
        self._progress = options

    @property
    def progress_bar_config(self) -> dict[str, Any]:
        """The options of `set_progress_bar_config`."""
        return dict(self._progress)

    def progress(self, description: str, total: int, *, main: bool = False, **options: Any) -> tqdm[Any]:
        """A progress bar with the options of `set_progress_bar_config`.

        Args:
            description: text before the bar.
            total: number of steps.
            main: whether it is the one bar of a generation that stays in a notebook (see `runtime.progress`).
            options: tqdm's, which take precedence.
        """
        options = {"desc": description, "total": total, **self._progress, **options}
        leave = main or self._depth == 0
        return progress_bar(None, self._screen or notebook_screen(), options, leave)

    def part(self, name: str) -> Any:
        """The part `name` with the interface of this package's, whatever is in its place.

        Raises:
            TypeError: it cannot take that place.
        """
        return adapted(name, getattr(self, name))

    def check_stages(self) -> None:
        """Check that all stages can run together, before a generation spends time on some of them.

        Raises:
            TypeError: a part cannot take its place.
            ValueError: a stage has no weights, or the stages are on different devices.
        """
        self.check_parts()
        devices = {}
        for name in self.stage_names:
            devices[name] = stage_device(getattr(self, name))
            if devices[name].type == "meta":
                raise ValueError(
                    f"pipe.{name} has no weights: its parameters are on the meta device; load them, for "
                    "example with from_pretrained"
                )
        if self._offload is None and len({*devices.values()}) > 1:
            where = ", ".join(f"{name} on {device}" for name, device in devices.items())
            raise ValueError(f"the stages are on different devices ({where}); move them with pipe.to(device)")

    def check_parts(self) -> None:
        """Check that each part can take its place.

        Raises:
            TypeError: one cannot; the message says why.
        """
        for name in self.stage_names:
            self.part(name)
            if not isinstance(getattr(self, name), nn.Module):
                raise TypeError(
                    f"{name} is of class {type(getattr(self, name)).__name__}; it must be an nn.Module"
                )
        for name in ("tokenizer", "tokenizer_2"):
            if not callable(getattr(self, name)) or isinstance(getattr(self, name), type):
                raise TypeError(f"{name} is {quoted(getattr(self, name))}; it must be one of transformers'")
        scheduler: Any = self.scheduler
        if isinstance(scheduler, type):
            raise TypeError(
                f"scheduler is the class {scheduler.__name__}; pass an object, such as "
                f"{scheduler.__name__}.from_config(pipe.scheduler.config)"
            )
        for method in ("set_timesteps", "step", "scale_model_input"):
            if not callable(getattr(scheduler, method, None)):
                raise TypeError(f"scheduler is {quoted(scheduler)}, which has no method {method}")

    @contextmanager
    def running(self, name: str) -> Iterator[Any]:
        """The stage `name`, ready to be called: on its device, and as fast as this machine allows.

        In a trace of torch.profiler, the block is the range "audioldm2.<name>".
        """
        stage: Any = getattr(self, name)
        outer = self._working, self._fast
        self._working = (name, stage)
        try:
            with recorded(name):
                self._place(name, stage)
                if stage in self._compiled:
                    self._fast = None
                    yield adapted(name, compiled(name, stage))
                else:
                    with fast_convolutions(stage) as self._fast:
                        yield adapted(name, stage)
        finally:
            self._working, self._fast = outer

    def _place(self, name: str, stage: nn.Module) -> None:
        """With offload, move a stage to the device, and prefetch the next one if it is a GPU."""
        if self._offload is not None:
            following = self.stage_names[self.stage_names.index(name) + 1 :]
            self._offload.take(stage, getattr(self, following[0]) if following else None)

    def refreshing(self, callback: Callable[P, R] | None) -> Callable[P, R] | None:
        """Wrap a caller's callback, which may change weights or run the pipeline again.

        After the callback, everything computed from the running stage's weights is discarded, and the stage
        is moved back to its device.

        Raises:
            ValueError: from the wrapped callback, if it replaced the running stage.
        """
        if callback is None:
            return None

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # Before the callback, too: if it runs the pipeline, stages that it changed leave the device.
            if self._offload is not None:
                self._offload.may_have_changed()
            scheduler = self.scheduler
            result = callback(*args, **kwargs)
            if self.scheduler is not scheduler:
                raise ValueError(
                    "the callback replaced pipe.scheduler, which is running; replace it between generations"
                )
            if self._fast is not None:
                self._fast.forget()
            if self._offload is not None:
                self._offload.may_have_changed()
            if self._working is not None:
                name, stage = self._working
                if getattr(self, name) is not stage:
                    raise ValueError(
                        f"the callback replaced pipe.{name}, which is running; replace it between generations"
                    )
                self._place(name, stage)
            return result

        return call

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Hold the pipeline's lock; at the end, also after an error, free the offload device."""
        with self._lock:
            if self._depth == 0:
                self._screen = notebook_screen()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._screen = None
                if self._offload is not None and self._depth == 0:
                    self._offload.release()
