"""Questions -> chains: the loop, its two protocols (engine, judge), quality rules, statistics, import and export."""
