"""One file per algorithm; `sharded` joins a rule with a layout."""
