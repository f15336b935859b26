"""Start, end and re-attach to process sessions."""
