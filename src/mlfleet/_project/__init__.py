"""From a URI to what is to be run: fetch, read, check, render."""
