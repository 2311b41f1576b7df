"""The parts of Helios that benches measure: models, engines and stacks."""
