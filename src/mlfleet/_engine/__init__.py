"""The life of a run, from its request to its terminal status.

The states of a run, each with MLflow's status in it, and the module that takes the run into it:

1. planned (no MLflow run): `request` checks the arguments, `plan` the project and its parameters. Mistakes of the
   caller show here, where nothing exists elsewhere yet.
2. queued (RUNNING, after a second SCHEDULED): the MLflow run exists, this process is its driver, and its record on this
   machine says so (`records`). It waits for its slot and its share of the machine (`admission`).
3. preparing (RUNNING): `job` makes its folder, its downloads and its environment.
4. starting (RUNNING, after ten seconds SCHEDULED): its backend has the job, whose reference is a tag of the run by now.
5. started (RUNNING): its command runs.
6. ended (RUNNING): its backend has reported the outcome, which the driver adds to the record.
7. concluded (FINISHED, FAILED or KILLED): the status is written, and the record is removed.

`supervisor` goes through states 2 to 7 for a run that is submitted here, and `attach` from where it finds one of an
earlier process; that makes this process its driver. `detached` follows a run whose driver is a process of its own.

Only the driver of a run concludes it, as long as it lives. Another process (`tracked`) has three ways to reach it:

- It waits until the status is written.
- Before the command has begun it asks the driver to cancel the run, by the pipe beside the record.
- Later it writes KILLED, and ends the run at its backend. The driver then takes the run for cancelled.

A run whose driver died may be in any state. `conclude` says how such a run is found to be over, and who writes what.
It is lost, which is FAILED with a `RunLost`, if nobody knows how it ended. A sweep runs the point of a lost run again.

`services` has what the runs of a Fleet share, and `context` adds the tracking server or store that some of them have.
"""
