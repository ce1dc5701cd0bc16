"""Inspect tasks, run as `inspect eval mote/xstest -T file=... --model mote/...`."""
