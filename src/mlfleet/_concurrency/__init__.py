"""Building blocks of asynchronous code: cancellation, threads, shared work, broadcasts, owners of tasks."""
