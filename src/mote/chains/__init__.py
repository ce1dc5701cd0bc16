"""Questions to reasoning chains: the adaptive loop and the two protocols it asks for, `Engine` and `Judge`."""
