"""The section `policy`: the controller's loop over drifting traffic."""
