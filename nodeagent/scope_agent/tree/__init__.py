"""The mesh tree: edges attach to hubs, and hubs route for the edges attached to them."""
