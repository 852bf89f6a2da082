{{- define "modelfs.selector" -}}
app.kubernetes.io/name: modelfs
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "modelfs.keeper" -}}
app.kubernetes.io/name: modelfs-keeper
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "modelfs.image" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{- define "modelfs.labels" -}}
{{ include "modelfs.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
