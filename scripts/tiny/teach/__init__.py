"""Teaching the tiny checkpoint a sound that it does not know, a ringing telephone, and what that costs."""
