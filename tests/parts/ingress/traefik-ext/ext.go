// Package ext is where Traefik's own build may add fields to its configuration. The module's archive leaves it out.
package ext

// HTTP adds nothing to the HTTP configuration.
type HTTP struct{}

// Router adds nothing to a router.
type Router struct{}
