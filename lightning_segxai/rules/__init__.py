"""Modified backward rules: how some functions of a network run backward, whoever calls them."""
