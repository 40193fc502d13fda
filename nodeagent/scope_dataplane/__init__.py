"""The dataplane: the processes that carry packets and outlive the agent."""
