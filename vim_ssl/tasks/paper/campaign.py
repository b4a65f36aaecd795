"""Measure the claims: estimate, run in slices, resume from the rows."""

from collections.abc import Sequence

from vim_ssl.tasks.paper.claims import Claim
from vim_ssl.tasks.paper.measure import Job, Settings
from vim_ssl.tasks.paper.rows import Rows
from vim_ssl.utils.names import plural, rough_time


def open_jobs(claims: Sequence[Claim], rows: Rows, settings: Settings) -> list[Job]:
    """The jobs of these claims that have no row yet, each once, in the order in which they run:
    first what is counted, then the trainings seed by seed, then what is timed."""
    known = rows.keys()
    jobs = {job.key: job for claim in claims if claim.measure is not None
            for job in claim.measure.jobs(settings) if job.key not in known}  # fmt: skip
    return sorted(jobs.values(), key=lambda job: job.order)


def run_jobs(jobs: Sequence[Job], rows: Rows, settings: Settings) -> None:
    """Run the jobs; each appends its row when it ends, so that an interrupted campaign goes on."""
    estimates = [job.estimate(rows, settings) for job in jobs]
    settings.report(
        f"{plural(len(jobs), 'measurement')}, about {rough_time(sum(estimates))} of processor time."
    )
    for i, job in enumerate(jobs):
        job.run(rows, settings)
        name = ", ".join(filter(None, vars(job.key).values()))
        left = sum(one.estimate(rows, settings) for one in jobs[i + 1 :])
        settings.report(f"[{i + 1}/{len(jobs)}] {name} · {rough_time(left)} left")
