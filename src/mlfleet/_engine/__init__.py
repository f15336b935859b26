"""The life of a run: request, plan, job, supervised run."""
