"""Programs that use the library: command line, demo, benchmarks, plans and plots. The library never imports them."""
