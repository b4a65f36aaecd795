"""Everything around the training arithmetic: progress bar, clock, signals, evaluations."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from vim_ssl.data.loading.indexed import collate
from vim_ssl.objectives.base import StepOutput
from vim_ssl.utils.distributed import cores
from vim_ssl.utils.names import number


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
            disable=not self.main, smoothing=0.05, mininterval=0.5,
        )  # fmt: skip
        self.since_step = self.since_save = time.perf_counter()
        self.seconds = self.waited = self.images = 0.0
        self.first = True
        return self

    def __exit__(self, kind, *exc):
        self.bar.close()
        if self.main and self.seconds and kind in (None, SystemExit):
            workers = self.schedule.workers
            print(bottleneck(self.images, self.seconds, self.waited, workers), flush=True)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum, frame):
        if self.stop and signum == signal.SIGINT:
            raise KeyboardInterrupt  # a second signal does not wait for the step
        self.stop = True

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
            text += f", {number(rate, 2)} img/s"
            self.seconds, self.waited = self.seconds + seconds, self.waited + waited
            self.images += samples
        self.first = False
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        return {"images_per_second": round(rate, 1), "data_wait": round(waited / seconds, 3)}

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
            objective.train(was_training)
            if out.images is not None:
                self.run.save_images("preview", self.progress.step, out.images())
            if evaluate is not None:
                metrics = evaluate()
                text = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
                self.bar.write(f"epoch {self.schedule.epoch_float(self.progress):.1f}: {text}")
        self.accelerator.wait_for_everyone()
        self.since_step = time.perf_counter()
        return metrics

    def broadcast_decision(self, decide: Callable[[], bool]) -> bool:
        """Return the result of ``decide``, called only on the main process, on all ranks."""
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
        """Print how to resume and exit with code 0."""
        if self.main:
            self.bar.write(f"Stopped at step {self.progress.step}; continue with --resume auto.")
        sys.exit(0)
