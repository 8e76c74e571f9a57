"""What calibration learns of how tokens spread over experts and values over channels."""
