"""What is measured of Helios: models, engines and stacks that a bench starts."""
