"""What runs beside the arithmetic: progress bar, clock, signals, evaluations."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from vim_ssl.data.loading.indexed import (
    collate,
)
from vim_ssl.objectives.base import StepOutput
from vim_ssl.training.accelerator import to_device
from vim_ssl.utils.distributed import cores
from vim_ssl.utils.names import number


def bottleneck(images: float, seconds: float, waited: float, workers: int) -> str:
    """Whether the data or the model set the pace, and what to do about it."""
    share = waited / seconds
    rate = number(images / seconds, 2)
    text = f"{rate} images/s, {100 * share:.0f} % of the time waiting for data: "
    if share < 0.2:  # what one core loads and trains by turns, small images wait for
        return text + "the model sets the pace, the data keep up."
    text += "the data set the pace" if share > 0.5 else "the data hold the model up"
    if workers < cores():
        return f"{text}; more --workers than {workers} may help."
    return f"{text}, with a worker on every core; smaller images may help."


class Monitor:
    """What goes on beside the arithmetic: progress bar, clock, signals, evaluations."""

    def __init__(self, plan, config, run, accelerator, progress):
        self.plan, self.config, self.run, self.accelerator = plan, config, run, accelerator
        self.progress, self.main = progress, accelerator.is_main_process
        self.stop = self.handlers = None

    def __enter__(self):
        self.stop = False
        self.handlers = {}
        for signum in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: no handlers there
                self.handlers[signum] = signal.signal(signum, self._on_signal)
        if self.main:
            print(self.plan.summary, flush=True)
        self.bar = tqdm(
            total=self.plan.total_steps, initial=self.progress.step, unit="step",
            disable=not self.main, smoothing=0.05, mininterval=0.5,
        )  # fmt: skip
        self.since_step = self.since_save = time.perf_counter()
        self.seconds = self.waited = self.images = 0.0
        self.first = True
        return self

    def __exit__(self, kind, *exc):
        self.bar.close()
        if self.main and self.seconds and kind in (None, SystemExit):
            print(bottleneck(self.images, self.seconds, self.waited, self.plan.workers), flush=True)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum, frame):
        if self.stop and signum == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.stop = True

    def step(self, loss: float, samples: float) -> dict[str, float]:
        """Move the bar; returns the step's images per second, over all processes, and the share
        of its time that this one waited for batches."""
        now = time.perf_counter()
        seconds, self.since_step = now - self.since_step, now
        self.progress.seconds += seconds
        rate = samples / seconds
        waited, self.plan.waited = self.plan.waited, 0.0
        shown = f"loss {loss:.4f}"
        if not self.first:  # which starts workers and compiles: it tells no pace
            shown += f", {number(rate, 2)} img/s"
            self.seconds, self.waited = self.seconds + seconds, self.waited + waited
            self.images += samples
        self.first = False
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        return {"images_per_second": round(rate, 1), "data_wait": round(waited / seconds, 3)}

    def evaluate(self, objective, samples, evaluate) -> dict[str, float]:
        """Images and figures on the main process while the others wait."""
        figures = {}
        if self.main:
            # Always the same eight samples, so that progress can be seen.
            preview = to_device(collate(samples.preview(8)), self.accelerator.device)
            was_training = objective.training
            objective.eval()
            with torch.no_grad(), self.accelerator.autocast():
                out: StepOutput = objective(preview)
            objective.train(was_training)
            if out.images is not None:
                self.run.save_images("pictures", self.progress.step, out.images())
            if evaluate is not None:
                figures = evaluate()
                text = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
                self.bar.write(f"epoch {self.plan.epoch_float(self.progress):.1f}: {text}")
        self.accelerator.wait_for_everyone()
        self.since_step = time.perf_counter()
        return figures

    def broadcast_decision(self, question: Callable[[], bool]) -> bool:
        """The main process's answer, on every process."""
        answer = float(self.main and question())
        flag = torch.tensor(answer, device=self.accelerator.device)
        return self.accelerator.reduce(flag).item() > 0

    def checkpoint_due(self) -> bool:
        """Whether to save now; the same answer on every process."""
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
        return self.stop

    def exit_after_save(self) -> None:
        if self.main:
            self.bar.write(f"Stopped at step {self.progress.step}; go on with --resume auto.")
        sys.exit(0)
