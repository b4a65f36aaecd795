"""Everything around the training arithmetic: progress bar, clock, signals, evaluations."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from vim_ssl.data.loading.indexed import collate
from vim_ssl.kernels.backends import is_compiling
from vim_ssl.objectives.base import StepOutput
from vim_ssl.training.run import resume_command
from vim_ssl.training.state import INTERRUPTED
from vim_ssl.utils.cores import cores
from vim_ssl.utils.names import number, plural, rough_time

ESTIMATED_AFTER = 5.0  # seconds of timed steps after which the time left is printed
# The time left is in the postfix: tqdm's own estimate includes the first step, which compiles.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class StepAbandoned(BaseException):
    """A signal ended a step. Not an Exception, which handlers of broken images would catch."""


def bottleneck(images: float, seconds: float, waited: float, workers: int) -> str:
    """Report whether data loading or the model limits the speed, and how to speed it up."""
    share = waited / seconds
    rate = number(images / seconds, 2)
    text = f"{rate} images/s, {100 * share:.0f} % of the time waiting for data: "
    if share < 0.2:  # common with small images, if one core both loads and trains
        return text + "the model limits the speed, not data loading."
    text += "data loading limits the speed" if share > 0.5 else "data loading slows the model down"
    if workers < cores():
        return f"{text}; more --workers than {workers} may help."
    return f"{text}, with a worker on every core; smaller images may help."


class Monitor:
    """Context manager around the loop: progress bar, clock, signal handlers, evaluations and
    decisions shared by all ranks."""

    def __init__(self, schedule, config, run, accelerator, progress):
        self.schedule, self.config, self.run = schedule, config, run
        self.accelerator, self.progress = accelerator, progress
        self.main = accelerator.is_main_process
        self.stop = self.handlers = None
        self.signal = 0  # the first one that this process received
        self._may_abandon = False

    def __enter__(self):
        self.stop = False
        self.handlers = {}
        for signum in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self.handlers[signum] = signal.signal(signum, self._on_signal)
        if self.main:
            print(self.schedule.summary, flush=True)
        self.bar = tqdm(
            total=self.schedule.total_steps, initial=self.progress.step, unit="step",
            disable=not self.main, mininterval=0.5, bar_format=BAR,
        )  # fmt: skip
        self.since_step = self.since_save = time.perf_counter()
        self.seconds = self.waited = self.images = 0.0
        self.timed = 0  # steps in `seconds`
        self.first = True
        self.estimated = False
        return self

    def __exit__(self, kind, *exc):
        self.bar.close()
        if self.main and kind in (None, SystemExit):
            if self.seconds:
                workers = self.schedule.workers
                print(bottleneck(self.images, self.seconds, self.waited, workers), flush=True)
            if self.run.skipped:
                broken = plural(len(self.run.skipped), "broken sample")
                print(f"{broken} skipped, replaced by others.", flush=True)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum, frame):
        if self.stop and signum == signal.SIGINT:
            raise KeyboardInterrupt  # a second signal does not wait for the step
        first, self.stop = not self.stop, True
        self.signal = self.signal or signum
        if first and self.main:  # not print, which may be what the signal interrupted
            os.write(2, b"\nStopping and saving; Ctrl-C ends at once, without saving.\n")
        if self._may_abandon and not is_compiling():
            raise StepAbandoned

    @contextlib.contextmanager
    def abandonable(self, model: nn.Module) -> Iterator[None]:
        """Run the part of a step before the optimiser's, which a signal ends at once, even within
        a micro-batch of minutes. Several processes finish it: they wait for each other's gradients.

        Raises: StepAbandoned after a signal; parameters and buffers are those before the step.
        """
        alone = self.accelerator.num_processes == 1
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if alone else []
        try:
            try:
                self._may_abandon = alone
                if self.stop and alone:
                    raise StepAbandoned
                yield
            finally:
                self._may_abandon = False
        except StepAbandoned:
            for buffer, before in buffers:
                buffer.copy_(before)
            raise

    def step(self, loss: float, samples: float) -> dict[str, float]:
        """Advance the bar; return the step's images per second over all processes, and the fraction
        of its time that this process waited for batches."""
        now = time.perf_counter()
        seconds, self.since_step = now - self.since_step, now
        self.progress.seconds += seconds
        rate = samples / seconds
        waited, self.schedule.waited = self.schedule.waited, 0.0
        text = f"loss {loss:.4f}"
        if not self.first:  # the first step starts workers and compiles
            self.seconds, self.waited = self.seconds + seconds, self.waited + waited
            self.images += samples
            self.timed += 1
            text += f", {number(rate, 2)} img/s"
            if self._steps_left():
                text += f", {self._time_left()} left"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        self.first = False
        if self.seconds >= ESTIMATED_AFTER and not self.estimated and self._steps_left():
            self.estimated = True
            steps = plural(self._steps_left(), "step")
            self.bar.write(f"Time left: {self._time_left()} for {steps}, without evaluations.")
        return {"images_per_second": round(rate, 1), "data_wait": round(waited / seconds, 3)}

    def _steps_left(self) -> int:
        return self.schedule.total_steps - self.progress.step

    def _time_left(self) -> str:
        """Estimate from the mean of the timed steps."""
        return rough_time(self._steps_left() * self.seconds / self.timed)

    def evaluate(self, objective, samples, evaluate) -> dict[str, float]:
        """Save preview images and return metrics, on the main process while the others wait."""
        from accelerate.utils import send_to_device

        metrics = {}
        if self.main:
            # Always the same eight samples, to show progress.
            preview = send_to_device(collate(samples.preview(8)), self.accelerator.device)
            was_training = objective.training
            objective.eval()
            with torch.no_grad(), self.accelerator.autocast():
                out: StepOutput = objective(preview)
            if out.images is not None:
                self.run.save_images("preview", self.progress.step, out.images())
            if evaluate is not None:
                metrics = evaluate()
            objective.train(was_training)  # last: only the objective knows what of it is frozen
            if metrics:
                text = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
                self.bar.write(f"epoch {self.schedule.epoch_float(self.progress):.1f}: {text}")
        self.accelerator.wait_for_everyone()
        self.since_step = time.perf_counter()
        return metrics

    def broadcast_decision(self, decide: Callable[[], bool] | None) -> bool:
        """Return the result of ``decide``, called only on the main process, on all ranks; False
        without a function."""
        if decide is None:
            return False
        decision = float(self.main and decide())
        flag = torch.tensor(decision, device=self.accelerator.device)
        return self.accelerator.reduce(flag).item() > 0

    def checkpoint_due(self) -> bool:
        """True when a checkpoint is due or any rank received a signal; identical on all ranks."""
        due = self.stop or (
            self.progress.step % self.config.save_steps == 0
            if self.config.save_steps
            else time.perf_counter() - self.since_save > 60 * self.config.save_every
        )
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([float(due), float(self.stop)], device=self.accelerator.device)
            flags = self.accelerator.reduce(flags).tolist()
            due, self.stop = flags[0] > 0, flags[1] > 0
        if due:
            self.since_save = time.perf_counter()
        return due

    def stop_requested(self) -> bool:
        """True after SIGTERM or SIGINT; identical on all ranks after `checkpoint_due`."""
        return self.stop

    def exit_after_save(self) -> None:
        """Record and print what is saved, what is left and how to resume; exit with code 0."""
        name = signal.Signals(self.signal).name if self.signal else "a signal to another process"
        self.run.state.end(INTERRUPTED, name)
        if self.main:
            step, total = self.progress.step, self.schedule.total_steps
            saved = self.run.checkpoints()[-1:]
            where = f"saved in {saved[0]}" if saved else "in the first step, so nothing is saved"
            left = f"{plural(self._steps_left(), 'step')} left"
            if self.timed:
                left += f", {self._time_left()}"
            command = resume_command(self.run, self.accelerator.num_processes)
            self.bar.write(
                f"Stopped at step {step:,} of {total:,}, {where}; {left}. Continue with:\n"
                f"  {command}"
            )
        sys.exit(0)
