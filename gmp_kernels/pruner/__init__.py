"""The parts of ``GMPScheduler``: what is due, the update itself, and zeros that hold between updates."""
