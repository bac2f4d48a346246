"""moe.routing_bias: a router's correction bias takes the dtype that the router reads, once, at load."""
