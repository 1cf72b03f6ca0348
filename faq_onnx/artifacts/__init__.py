"""Records that the rooms exchange; all of them go to disk and come back."""
