"""Programs that use the library: the command line, the demo, benchmarks, plans and plots. Nothing imports them."""
