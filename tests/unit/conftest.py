"""Property tests judge behaviour, not speed: on a busy machine hypothesis' own deadlines fail at random."""

from hypothesis import HealthCheck, settings

settings.register_profile("echo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("echo")
