{{- define "portpool.labels" -}}
app.kubernetes.io/name: portpool
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: controller
app.kubernetes.io/part-of: portpool
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "portpool.selector" -}}
app.kubernetes.io/name: portpool
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: controller
{{- end }}

{{- define "portpool.name" -}}
{{- if eq .Release.Name "portpool" }}portpool-controller{{ else }}{{ printf "%s-portpool-controller" .Release.Name | trunc 63 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "portpool.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* What a controller does in a namespace whose pools it looks after. */ -}}
{{- define "portpool.rules" -}}
- apiGroups: [portpool.dev]
  resources: [processingpools]
  verbs: [get, list, watch]
- apiGroups: [portpool.dev]
  resources: [processingpools/status]
  verbs: [patch]
# For owner references that hold up the pool's deletion until the owned are gone.
- apiGroups: [portpool.dev]
  resources: [processingpools/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
# The table; also what the connection servers' Roles give on.
- apiGroups: [""]
  resources: [configmaps, serviceaccounts]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}
