"""Small pieces that methods share: distances, weightings, laws of time."""
