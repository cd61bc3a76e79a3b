"""Attribution methods: each is a frozen dataclass that turns a scored model into a map."""
